"""Which engine takes which part of a new plan, so that the least is loaded and all finds room: an assignment problem.
Pure.
"""

import msgspec
import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from loraserve.planner.placement.bins import Filling
from loraserve.planner.placement.problem import Copies, Floats, Ints, Problem, flat


def relabel(worth_bytes: Floats) -> Ints:
    """By part, its engine: the one-to-one choice that is worth most.

    ``worth_bytes[part, engine]``: bytes that the part wants and the engine holds, less those that it has no room for.
    Solved exactly, by scipy's Jonker-Volgenant. Where it makes no difference, part i is engine i.
    """
    size = len(worth_bytes)
    if size == 0 or not worth_bytes.any():
        return np.arange(size)
    # Ties are broken towards the order, by less than a byte in all.
    nudge = np.eye(size) * (0.5 / size)
    _, engines = linear_sum_assignment(worth_bytes + nudge, maximize=True)
    return np.asarray(engines, np.int64)


class Wishes(msgspec.Struct, frozen=True, eq=False):
    """``budgets``: by bin and class, the utilisation that the bin should have of it; ``parts``: the same as a part of
    all that there is of the class. ``class_rows``: by adapter its class, as a column; -1 where nobody asks for it."""

    budgets: Floats
    parts: Floats
    class_rows: Ints


def wishes_of(filling: Filling) -> Wishes:
    kinds = sorted({kind for part in filling.bins for kind in part.budgets})
    columns = {kind: i for i, kind in enumerate(kinds)}
    budgets = np.zeros((len(filling.bins), len(kinds)))
    for i, part in enumerate(filling.bins):
        for kind, budget in part.budgets.items():
            budgets[i, columns[kind]] = budget
    parts = budgets / np.maximum(budgets.sum(axis=0), 1e-300)
    class_of = np.array(filling.class_of, np.int64)
    return Wishes(budgets, parts, np.where(class_of < 0, -1, np.searchsorted(kinds, class_of)))


def kept_bytes(problem: Problem, wishes: Wishes, held: Copies) -> Floats:
    """By bin and engine: bytes held there of the classes that the bin wants, each by the part of it that it wants."""
    bins, classes = wishes.parts.shape
    if classes <= 1:  # All bins want the same.
        return np.zeros((bins, bins))
    holds = np.zeros((classes, len(problem.engines)))
    adapters, engines, _ = flat(held)
    rows = wishes.class_rows[adapters]
    asked = rows >= 0
    np.add.at(holds, (rows[asked], engines[asked]), problem.extents[adapters[asked]])
    result: Floats = wishes.parts @ holds
    return result


def spilt_bytes(problem: Problem, wishes: Wishes) -> Floats:
    """By bin and engine: work that finds no room there, further to where it finds most; 0 where all have as much room.

    Work counts as the bytes that as much takes on the whole. The engine is taken to hold what brings most by the byte:
    a few hot adapters are at home in a small pool, and the bytes of cold ones are no loss to it.
    """
    rooms, which = np.unique(problem.room_bytes, return_inverse=True)
    asked = wishes.class_rows >= 0
    if not asked.any():
        return np.zeros((len(wishes.parts), len(which)))
    class_bytes = np.bincount(wishes.class_rows[asked], problem.extents[asked], wishes.parts.shape[1])
    bin_bytes = wishes.parts @ class_bytes
    fits = np.minimum(1.0, rooms / np.maximum(bin_bytes, 1.0)[:, None])
    spilt = np.zeros_like(fits)
    for row, budgets in enumerate(wishes.budgets.T):
        wanting = budgets > 0
        spilt[wanting] += budgets[wanting, None] * (1 - _work_within(problem, wishes.class_rows == row, fits[wanting]))
    spilt -= spilt.min(axis=1, keepdims=True)
    result: Floats = spilt[:, which] * (class_bytes.sum() / wishes.budgets.sum())
    return result


def _work_within(problem: Problem, chosen: npt.NDArray[np.bool_], fits: Floats) -> Floats:
    """Of the work of the chosen adapters, what those bring that come first by work a byte, in such parts of the bytes
    of all."""
    whole, extents = problem.whole()[chosen], problem.extents[chosen]
    order = np.argsort(-whole / extents, kind="stable")
    taken, work = (np.concatenate([[0.0], np.cumsum(values[order])]) for values in (extents, whole))
    result: Floats = np.interp(fits, taken / taken[-1], work / work[-1])
    return result
