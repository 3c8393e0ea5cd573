"""Which engine takes which bin, so that the least is loaded and work finds room: an assignment problem."""

import msgspec
import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from loraserve.planner.placement.bins import BinFilling
from loraserve.planner.placement.problem import CopyMap, Floats, Ints, Problem, flatten

OVERFLOW_WEIGHT = 20.0
"""Bytes loaded that one byte without room is worth: a load is paid once, while work that overflows slows down other
engines for as long as the plan lasts."""


class EngineChoice(msgspec.Struct):
    """``engine_of``: engine by bin. ``short``: engines with less room than others and too little for their bin."""

    engine_of: list[int]
    short: frozenset[int]


def choose_engines(problem: Problem, filling: BinFilling, held: CopyMap) -> EngineChoice:
    budgets = tabulate_budgets(filling)
    kept = kept_bytes(problem, budgets, held)
    if (problem.room_bytes == problem.room_bytes[0]).all():
        return EngineChoice(assign_bins(kept).tolist(), frozenset())
    overflow = overflow_bytes(problem, budgets)
    # With one class all bins are alike, and for such a matrix the solver takes longest.
    engine_of = assign_bins(kept - OVERFLOW_WEIGHT * overflow if budgets.parts.shape[1] > 1 else kept)
    short = engine_of[overflow[np.arange(len(overflow)), engine_of] > 0]
    return EngineChoice(engine_of.tolist(), frozenset(short.tolist()))


def assign_bins(value_bytes: Floats) -> Ints:
    """Return by bin its engine: the one-to-one assignment of the highest total value.

    ``value_bytes[bin, engine]``: bytes that the bin needs and the engine holds, less those that find no room there.
    Solved exactly, by scipy's Jonker-Volgenant. Ties are resolved towards bin i on engine i.
    """
    size = len(value_bytes)
    if size == 0 or not value_bytes.any():
        return np.arange(size)
    # The bonus on the diagonal sums to less than a byte, so it decides ties only.
    bonus = np.eye(size) * (0.5 / size)
    _, engines = linear_sum_assignment(value_bytes + bonus, maximize=True)
    return np.asarray(engines, np.int64)


class BudgetTable(msgspec.Struct, frozen=True, eq=False):
    """The budgets of a filling as arrays.

    ``budgets[bin, column]``: utilisation that the bin should have of a class. ``parts``: the same as a fraction of all
    work of the class. ``column_of``: by adapter, the column of its class; -1 for adapters without traffic.
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
    """Return by bin and engine the bytes that the engine holds of the bin's classes, weighted by the bin's parts."""
    bins, classes = table.parts.shape
    if classes <= 1:  # All bins need the same.
        return np.zeros((bins, bins))
    held_bytes = np.zeros((classes, len(problem.engines)))
    adapters, engines, _ = flatten(held)
    columns = table.column_of[adapters]
    used = columns >= 0
    np.add.at(held_bytes, (columns[used], engines[used]), problem.extents[adapters[used]])
    result: Floats = table.parts @ held_bytes
    return result


def overflow_bytes(problem: Problem, table: BudgetTable) -> Floats:
    """Return by bin and engine the work that finds no room there, beyond that on the engine with the most room.

    Work is counted as the bytes that as much work takes on average. An engine is taken to hold the adapters with the
    most work per byte: a few hot adapters suit a small pool, which loses nothing by leaving out cold ones.
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
    """Return the fraction of the chosen adapters' work that fits into fractions of their bytes, densest work first."""
    work, extents = problem.own_utilisation()[chosen], problem.extents[chosen]
    order = np.argsort(-work / extents, kind="stable")
    bytes_taken, work_taken = (np.concatenate([[0.0], np.cumsum(values[order])]) for values in (extents, work))
    result: Floats = np.interp(byte_parts, bytes_taken / bytes_taken[-1], work_taken / work_taken[-1])
    return result
