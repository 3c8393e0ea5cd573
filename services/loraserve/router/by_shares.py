"""The paper's routing: a copy is drawn by the plan's shares, whatever waits there. Pure.

A copy that is planned and not there yet is loaded by the request that comes for it. What is predicted is for people to
read: it decides nothing.
"""

from collections.abc import Sequence

import numpy as np

from loraserve.cost import CostModel
from loraserve.messages import Rejected, Route
from loraserve.router.choice import Choice, Rng, Slo
from loraserve.router.filters import able_columns, no_engine, unfit
from loraserve.router.pick import MOST_CANDIDATES, by_lot, choice_of
from loraserve.router.policy import shares_by_column
from loraserve.router.score import score
from loraserve.router.shares import PlannedCopies
from loraserve.router.view import ClusterView


def route_by_shares(
    request: Route, view: ClusterView, plan: PlannedCopies | None, cost: CostModel, slo: Slo, rng: Rng
) -> Choice | Rejected:
    """Planned copies in the order of a lot, then any engine that is ready; those that do not answer last."""
    table = view.prices(cost)
    if not table.engines:
        return no_engine(request)
    able = able_columns(request, table)
    if able is not None and not able.any():
        return unfit(request, table)
    shares = shares_by_column(plan, request, view)
    avoided = table.columns.avoided
    columns: Sequence[int] = range(len(table.engines)) if able is None else able.nonzero()[0].tolist()
    scores = score(request, view, table, shares, cost)
    if able is not None:
        scores.score[~able] = np.inf
    chosen: list[int] = []
    for planned, suspect in ((True, False), (False, False), (True, True), (False, True)):
        if len(chosen) < MOST_CANDIDATES:
            group = [c for c in columns if (c in shares) == planned and bool(avoided[c]) == suspect]
            chosen += by_lot(group, shares, rng)
    return choice_of(chosen, None, view, table, scores, cost)
