"""Divides the work among bins, one per engine, by rank. An adapter's traffic can be split at any point.

With padded cost, every token costs as much as the largest rank in its batch, so similar ranks belong on one engine.
Some optimal division gives each engine a contiguous interval of the adapters in order of rank. The reason is an
exchange argument: a swap of work towards that order never raises either engine's largest rank. For a given
utilisation, greedy filling from the highest rank down uses the fewest bins. Bisection finds the least utilisation for
which the bins suffice. With exact cost, all adapters form one class, and the result is the mean utilisation.
"""

from bisect import bisect_left
from itertools import pairwise

import msgspec
import numpy as np

from loraserve.planner.placement.problem import CopyShares, Problem

PRECISION = 1e-4
"""Relative precision of the bisection."""
NO_CLASS = -1
"""Class of adapters without traffic."""


class Bin(msgspec.Struct):
    """The share of the work that one engine will get.

    ``rank`` is the largest rank in it; ``budgets`` gives the utilisation that each class of adapters may use.
    """

    rank: float
    budgets: dict[int, float]


class BinFilling(msgspec.Struct):
    """Bins, and the classes of adapters that their budgets refer to.

    ``utilisation``: the target utilisation of a bin. ``class_of``: the class of each adapter. ``shares``: the ideal
    placement, which splits adapters at bin boundaries and ignores memory and loads. Its engine i is bin i.
    """

    utilisation: float
    bins: list[Bin]
    class_of: list[int]
    shares: CopyShares


def fill_bins(problem: Problem, bins: int) -> BinFilling:
    """Divide the work among this number of bins. The other engines get empty bins.

    With padded cost, each rank is a class. Otherwise all adapters with traffic form one class.
    """
    engines, class_of = len(problem.engines), [NO_CLASS] * len(problem.versions)
    line = _WorkLine(problem)
    if not line.ranks:
        none = np.zeros(0, np.int64)
        return BinFilling(0.0, [Bin(0.0, {}) for _ in range(engines)], class_of, CopyShares(none, none, np.zeros(0)))
    for a in line.order.tolist():
        class_of[a] = int(problem.ranks[a]) if problem.padded else 0
    utilisation = _least_utilisation(line, problem, bins)
    cuts = line.cut(utilisation, bins)
    cuts[-1] = line.end
    classes = [class_of[a] for a in line.order.tolist()]
    filled = [_bin_between(line, classes, start, end) for start, end in pairwise(cuts)]
    filled += [Bin(0.0, {}) for _ in range(engines - len(filled))]
    return BinFilling(utilisation, filled, class_of, _cut_adapters(line, cuts))


class _WorkLine:
    """The work of all adapters in descending order of rank, as a line that can be cut anywhere.

    A cut is a position in that order. For example, 2.25 is after a quarter of the third adapter's work.
    """

    def __init__(self, problem: Problem) -> None:
        used = np.flatnonzero(problem.own_utilisation() > 0)
        self.order = used[np.argsort(-problem.ranks[used], kind="stable")]
        self._base: list[float] = [0.0, *np.cumsum(problem.work.base[self.order]).tolist()]
        self._slope: list[float] = [0.0, *np.cumsum(problem.work.slope[self.order]).tolist()]
        self.ranks: list[int] = problem.ranks[self.order].tolist()
        self.end = float(len(self.ranks))

    def work_before(self, cut: float, rank: float) -> float:
        """Return the utilisation by all work before the cut, on an engine with this largest rank."""
        i = min(int(cut), len(self.ranks))
        low = self._base[i] + rank * self._slope[i]
        if cut == i:
            return low
        return low + (cut - i) * (self._base[i + 1] + rank * self._slope[i + 1] - low)

    def cut(self, utilisation: float, bins: int) -> list[float]:
        """Return the boundaries of bins with this utilisation. The last one equals ``end`` if the bins suffice."""
        cuts = [0.0]
        while len(cuts) <= bins and cuts[-1] < self.end:
            cuts.append(self._next_cut(cuts[-1], utilisation))
        return cuts

    def _next_cut(self, cut: float, utilisation: float) -> float:
        rank = self.ranks[int(cut)]
        goal = self.work_before(cut, rank) + utilisation
        base, slope = self._base, self._slope
        i = bisect_left(range(len(base)), goal, lo=int(cut), key=lambda j: base[j] + rank * slope[j])
        if i >= len(base):
            return self.end
        low, high = (base[j] + rank * slope[j] for j in (i - 1, i))
        return max(cut, i - 1 + (goal - low) / (high - low) if high > low else float(i))


def _least_utilisation(line: _WorkLine, problem: Problem, bins: int) -> float:
    low = float(problem.own_utilisation().sum()) / bins
    high = line.work_before(line.end, line.ranks[0]) / bins * (1 + PRECISION)
    if line.cut(low * (1 + PRECISION), bins)[-1] >= line.end:
        return low * (1 + PRECISION)
    while high - low > PRECISION * high:
        middle = (low + high) / 2
        if line.cut(middle, bins)[-1] >= line.end:
            high = middle
        else:
            low = middle
    return high


def _cut_adapters(line: _WorkLine, cuts: list[float]) -> CopyShares:
    ends = np.unique(np.concatenate([np.arange(line.end + 1), cuts]))
    starts = ends[:-1]
    engines = np.searchsorted(np.array(cuts), starts, side="right") - 1
    return CopyShares(line.order[starts.astype(np.int64)], engines.astype(np.int64), np.diff(ends))


def _bin_between(line: _WorkLine, classes: list[int], start: float, end: float) -> Bin:
    rank = float(line.ranks[min(int(start), len(line.ranks) - 1)])
    budgets: dict[int, float] = {}
    cut = start
    while cut < end:
        adapter_class = classes[int(cut)]
        class_end = bisect_left(range(len(classes)), -adapter_class + 1, lo=int(cut), key=lambda j: -classes[j])
        stop = min(end, float(class_end))
        budgets[adapter_class] = line.work_before(stop, rank) - line.work_before(cut, rank)
        cut = stop
    return Bin(rank, budgets)
