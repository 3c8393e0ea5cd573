"""Which engine takes which part of a new plan, so that the least is loaded and all finds room: an assignment problem.
Pure.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment

from loraserve.planner.problem import Floats, Ints


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
