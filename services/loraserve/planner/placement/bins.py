"""Divides the work of all adapters into one bin for each engine, and assigns the bins to engines.

With padded cost, every token costs as much as the largest rank in its batch, so similar ranks belong on one engine.
Sort the adapters by rank. Some optimal division gives each bin a contiguous interval, because two engines can always
swap work towards this order without a higher largest rank. A boundary can split an adapter's traffic. Filling bins to a
given utilisation from the highest rank down uses the fewest bins. Bisection finds the least utilisation for which the
bins suffice. With exact cost (each token costs as much as its own rank), this least utilisation is the mean.

Bins go to engines that already hold many of their adapters' bytes and whose pools are large enough.
"""

from bisect import bisect_left
from itertools import pairwise

import msgspec
import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from loraserve.planner.placement.problem import CopyMap, CopyShares, Floats, Ints, Problem, flatten

PRECISION = 1e-4
"""Relative precision of the bisection."""
NO_CLASS = -1
"""Class of adapters without traffic."""


class Bin(msgspec.Struct):
    """The work that one engine will get.

    ``rank``: the largest rank in the bin. ``budgets``: the utilisation for each class of adapters (see ``fill_bins``).
    """

    rank: float
    budgets: dict[int, float]


class BinFilling(msgspec.Struct):
    """Bins, and the class of each adapter (``class_of``, see ``fill_bins``).

    ``utilisation``: the target utilisation of a bin. ``shares``: the ideal placement, which splits adapters at bin
    boundaries and ignores memory and the cost of loads. Engine i stands for bin i.
    """

    utilisation: float
    bins: list[Bin]
    class_of: list[int]
    shares: CopyShares


def fill_bins(problem: Problem, bins: int) -> BinFilling:
    """Divide the work among ``bins`` bins. If there are more engines, add empty bins for them.

    With padded cost, each rank is a class. Otherwise all adapters with traffic form one class.
    """
    engines, class_of = len(problem.engines), [NO_CLASS] * len(problem.refs)
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
        """Return the utilisation that all work before the cut causes on an engine with largest rank ``rank``."""
        i = min(int(cut), len(self.ranks))
        low = self._base[i] + rank * self._slope[i]
        if cut == i:
            return low
        return low + (cut - i) * (self._base[i + 1] + rank * self._slope[i + 1] - low)

    def cut(self, utilisation: float, bins: int) -> list[float]:
        """Return the boundaries of up to ``bins`` bins with this utilisation. If all work fits, the last is ``end``."""
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


OVERFLOW_WEIGHT = 20.0
"""Weight of a byte that overflows, relative to a byte to load. A load is paid once. Overflow slows down other engines
as long as the plan is in force."""


class EngineChoice(msgspec.Struct):
    """The engine of each bin. ``short``: engines that hold less of their bin's work than the largest pool would."""

    engine_of: list[int]
    short: frozenset[int]


def choose_engines(problem: Problem, filling: BinFilling, held: CopyMap) -> EngineChoice:
    budgets = tabulate_budgets(filling)
    kept = kept_bytes(problem, budgets, held)
    if (problem.room_bytes == problem.room_bytes[0]).all():
        return EngineChoice(assign_bins(kept).tolist(), frozenset())
    overflow = overflow_bytes(problem, budgets)
    # With one class, all bins are alike. The solver is slowest for such a matrix.
    engine_of = assign_bins(kept - OVERFLOW_WEIGHT * overflow if budgets.parts.shape[1] > 1 else kept)
    short = engine_of[overflow[np.arange(len(overflow)), engine_of] > 0]
    return EngineChoice(engine_of.tolist(), frozenset(short.tolist()))


def assign_bins(value_bytes: Floats) -> Ints:
    """Return the engine of each bin in the one-to-one assignment with the highest total value.

    ``value_bytes[bin, engine]`` is the value of this pair in bytes. The solution is exact (scipy's modified
    Jonker-Volgenant algorithm). Of assignments with equal value, the one with the most bins i on engine i is chosen.
    """
    size = len(value_bytes)
    if size == 0 or not value_bytes.any():
        return np.arange(size)
    # The bonuses on the diagonal sum to less than one byte, so they only break ties.
    bonus = np.eye(size) * (0.5 / size)
    _, engines = linear_sum_assignment(value_bytes + bonus, maximize=True)
    return np.asarray(engines, np.int64)


class BudgetTable(msgspec.Struct, frozen=True, eq=False):
    """The budgets of a ``BinFilling`` as arrays, with one column per class of adapters.

    ``budgets[bin, column]``: the bin's utilisation for the class. ``parts[bin, column]``: that budget as a fraction of
    the class's budgets in all bins. ``column_of``: by adapter, the column of its class, or -1 without traffic.
    """

    budgets: Floats
    parts: Floats
    column_of: Ints


def tabulate_budgets(filling: BinFilling) -> BudgetTable:
    classes = sorted({adapter_class for part in filling.bins for adapter_class in part.budgets})
    columns = {adapter_class: i for i, adapter_class in enumerate(classes)}
    budgets = np.zeros((len(filling.bins), len(classes)))
    for i, part in enumerate(filling.bins):
        for adapter_class, budget in part.budgets.items():
            budgets[i, columns[adapter_class]] = budget
    parts = budgets / np.maximum(budgets.sum(axis=0), 1e-300)
    class_of = np.array(filling.class_of, np.int64)
    return BudgetTable(budgets, parts, np.where(class_of < 0, -1, np.searchsorted(classes, class_of)))


def kept_bytes(problem: Problem, table: BudgetTable, held: CopyMap) -> Floats:
    """Return ``[bin, engine]``: bytes of the bin's classes that the engine holds, weighted by ``BudgetTable.parts``."""
    bins, classes = table.parts.shape
    if classes <= 1:  # All bins are alike.
        return np.zeros((bins, bins))
    held_bytes = np.zeros((classes, len(problem.engines)))
    adapters, engines, _ = flatten(held)
    columns = table.column_of[adapters]
    used = columns >= 0
    np.add.at(held_bytes, (columns[used], engines[used]), problem.extents[adapters[used]])
    result: Floats = table.parts @ held_bytes
    return result


def overflow_bytes(problem: Problem, table: BudgetTable) -> Floats:
    """Return ``[bin, engine]``: the bin's work, in bytes, that fits the largest pool but not the engine's pool.

    Work is converted to bytes at the mean bytes per unit of work. An engine is assumed to hold the adapters with the
    most work per byte. A small pool therefore suits a bin with a few hot adapters and many cold ones.
    """
    rooms, room_of = np.unique(problem.room_bytes, return_inverse=True)
    used = table.column_of >= 0
    if not used.any():
        return np.zeros((len(table.parts), len(room_of)))
    class_bytes = np.bincount(table.column_of[used], problem.extents[used], table.parts.shape[1])
    bin_bytes = table.parts @ class_bytes
    fitting = np.minimum(1.0, rooms / np.maximum(bin_bytes, 1.0)[:, None])
    overflow = np.zeros_like(fitting)
    for column, budgets in enumerate(table.budgets.T):
        needing = budgets > 0
        fits = _work_within(problem, table.column_of == column, fitting[needing])
        overflow[needing] += budgets[needing, None] * (1 - fits)
    overflow -= overflow.min(axis=1, keepdims=True)
    result: Floats = overflow[:, room_of] * (class_bytes.sum() / table.budgets.sum())
    return result


def _work_within(problem: Problem, chosen: npt.NDArray[np.bool_], byte_parts: Floats) -> Floats:
    """Return the largest fraction of the chosen adapters' work that fits, for each fraction of their bytes."""
    work, extents = problem.own_utilisation()[chosen], problem.extents[chosen]
    order = np.argsort(-work / extents, kind="stable")
    bytes_taken, work_taken = (np.concatenate([[0.0], np.cumsum(values[order])]) for values in (extents, work))
    result: Floats = np.interp(byte_parts, bytes_taken / bytes_taken[-1], work_taken / work_taken[-1])
    return result
