"""Which engine takes which part of a new plan, so that the least is loaded: an assignment problem. Pure."""

import numpy as np
from scipy.optimize import linear_sum_assignment

from loraserve.planner.problem import Floats, Ints


def relabel(kept_bytes: Floats) -> Ints:
    """By part, its engine: the one-to-one choice under which most bytes are there already.

    ``kept_bytes[part, engine]``: bytes that the part wants and the engine holds. Solved exactly, by scipy's
    Jonker-Volgenant. Where it makes no difference, part i is engine i.
    """
    size = len(kept_bytes)
    if size == 0 or not kept_bytes.any():
        return np.arange(size)
    # Ties are broken towards the order, by less than a byte in all.
    nudge = np.eye(size) * (0.5 / size)
    _, engines = linear_sum_assignment(kept_bytes + nudge, maximize=True)
    return np.asarray(engines, np.int64)
