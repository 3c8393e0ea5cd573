"""Assigns bins to engines so that few bytes are loaded and the work of each bin fits into the engine's pool."""

import msgspec
import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from loraserve.planner.placement.bins import BinFilling
from loraserve.planner.placement.problem import CopyMap, Floats, Ints, Problem, flatten

OVERFLOW_WEIGHT = 20.0
"""Weight of a byte that overflows, relative to a byte to load. A load is paid once. Overflow slows down other engines
as long as the plan is in force."""


class EngineChoice(msgspec.Struct):
    """``engine_of``: the engine of each bin. ``short``: engines that are too small for all the bytes of their bin."""

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
    Jonker-Volgenant algorithm). Among equal values, bin i prefers engine i.
    """
    size = len(value_bytes)
    if size == 0 or not value_bytes.any():
        return np.arange(size)
    # The bonuses on the diagonal sum to less than one byte, so they only break ties.
    bonus = np.eye(size) * (0.5 / size)
    _, engines = linear_sum_assignment(value_bytes + bonus, maximize=True)
    return np.asarray(engines, np.int64)


class BudgetTable(msgspec.Struct, frozen=True, eq=False):
    """The budgets of a filling as arrays, with one column per class of adapters.

    ``budgets[bin, column]``: utilisation of the bin by the class. ``parts[bin, column]``: the budget as a fraction of
    the class's total. ``column_of``: by adapter, the column of its class, or -1 without traffic.
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
    """Return by bin and engine the bytes of the bin's classes that the engine holds, weighted by the bin's parts."""
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
    """Return by bin and engine how much more of the bin's work overflows there than on the engine with the most memory.

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
    """Return the fraction of the chosen adapters' work in ``byte_parts`` of their bytes, most work per byte first."""
    work, extents = problem.own_utilisation()[chosen], problem.extents[chosen]
    order = np.argsort(-work / extents, kind="stable")
    bytes_taken, work_taken = (np.concatenate([[0.0], np.cumsum(values[order])]) for values in (extents, work))
    result: Floats = np.interp(byte_parts, bytes_taken / bytes_taken[-1], work_taken / work_taken[-1])
    return result
