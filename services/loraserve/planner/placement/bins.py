"""How much of which rank each engine should serve: the least utilisation at which the engines are enough. Pure.

Where every token pays its batch's largest rank, an engine costs the less the nearer its ranks are to each other. Cost
grows with the largest rank, so that some best division has engines serve contiguous intervals of the ranks in order
(by exchange: swapping two pieces towards the order never raises either engine's largest rank). Filling greedily from
the highest rank down at a given utilisation uses the fewest engines, and bisection finds the utilisation.
With exact cost there is one class of adapters, and the same fill says the mean.
"""

from bisect import bisect_left
from itertools import pairwise

import msgspec
import numpy as np

from loraserve.planner.placement.problem import Pieces, Problem

PRECISION = 1e-4


class Bin(msgspec.Struct):
    """One engine yet without a name. ``budgets``: by class of adapters, the utilisation that it should have of it."""

    rank: float
    budgets: dict[int, float]


class Filling(msgspec.Struct):
    """``class_of``: by adapter; adapters nobody asks for have class -1. ``utilisation``: of the fullest engine.
    ``pieces``: adapters cut as if their parts took no memory and cost no load; engine i is bin i."""

    utilisation: float
    bins: list[Bin]
    class_of: list[int]
    pieces: Pieces


class _Line:
    """Adapters in order of falling rank, as a line of work that can be cut anywhere."""

    def __init__(self, problem: Problem) -> None:
        asked = np.flatnonzero(problem.whole() > 0)
        self.order = asked[np.argsort(-problem.ranks[asked], kind="stable")]
        self._base: list[float] = [0.0, *np.cumsum(problem.work.base[self.order]).tolist()]
        self._slope: list[float] = [0.0, *np.cumsum(problem.work.slope[self.order]).tolist()]
        self.ranks: list[int] = problem.ranks[self.order].tolist()
        self.end = float(len(self.ranks))

    def work(self, cut: float, rank: float) -> float:
        """Of all before the cut, on engines of this largest rank."""
        i = min(int(cut), len(self.ranks))
        low = self._base[i] + rank * self._slope[i]
        if cut == i:
            return low
        return low + (cut - i) * (self._base[i + 1] + rank * self._slope[i + 1] - low)

    def advance(self, cut: float, utilisation: float) -> float:
        """The cut to which one engine gets that starts at this one."""
        rank = self.ranks[int(cut)]
        goal = self.work(cut, rank) + utilisation
        base, slope = self._base, self._slope
        i = bisect_left(range(len(base)), goal, lo=int(cut), key=lambda j: base[j] + rank * slope[j])
        if i >= len(base):
            return self.end
        low, high = (base[j] + rank * slope[j] for j in (i - 1, i))
        return max(cut, i - 1 + (goal - low) / (high - low) if high > low else float(i))

    def cuts(self, utilisation: float, engines: int) -> list[float]:
        """Where engines begin and end; the last is the end where they are enough."""
        cuts = [0.0]
        while len(cuts) <= engines and cuts[-1] < self.end:
            cuts.append(self.advance(cuts[-1], utilisation))
        return cuts


def fill(problem: Problem) -> Filling:
    """Classes are ranks, or one for all where cost is exact."""
    engines, class_of = len(problem.engines), [-1] * len(problem.versions)
    line = _Line(problem)
    if not line.ranks:
        none = np.zeros(0, np.int64)
        return Filling(0.0, [Bin(0.0, {}) for _ in range(engines)], class_of, Pieces(none, none, np.zeros(0)))
    for a in line.order.tolist():
        class_of[a] = int(problem.ranks[a]) if problem.padded else 0
    utilisation = _least(line, problem, engines)
    cuts = line.cuts(utilisation, engines)
    cuts[-1] = line.end
    classes = [class_of[a] for a in line.order.tolist()]
    bins = [_bin(line, classes, *ends) for ends in pairwise(cuts)]
    bins += [Bin(0.0, {}) for _ in range(engines - len(bins))]
    return Filling(utilisation, bins, class_of, _pieces(line, cuts))


def _least(line: _Line, problem: Problem, engines: int) -> float:
    low = float(problem.whole().sum()) / engines
    high = line.work(line.end, line.ranks[0]) / engines * (1 + PRECISION)
    if line.cuts(low * (1 + PRECISION), engines)[-1] >= line.end:
        return low * (1 + PRECISION)
    while high - low > PRECISION * high:
        middle = (low + high) / 2
        if line.cuts(middle, engines)[-1] >= line.end:
            high = middle
        else:
            low = middle
    return high


def _pieces(line: _Line, cuts: list[float]) -> Pieces:
    ends = np.unique(np.concatenate([np.arange(line.end + 1), cuts]))
    starts = ends[:-1]
    engines = np.searchsorted(np.array(cuts), starts, side="right") - 1
    return Pieces(line.order[starts.astype(np.int64)], engines.astype(np.int64), np.diff(ends))


def _bin(line: _Line, classes: list[int], start: float, end: float) -> Bin:
    rank = float(line.ranks[min(int(start), len(line.ranks) - 1)])
    budgets: dict[int, float] = {}
    cut = start
    while cut < end:
        kind = classes[int(cut)]
        after = float(bisect_left(range(len(classes)), -kind + 1, lo=int(cut), key=lambda j: -classes[j]))
        stop = min(end, after)
        budgets[kind] = line.work(stop, rank) - line.work(cut, rank)
        cut = stop
    return Bin(rank, budgets)
