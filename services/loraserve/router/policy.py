"""Which engine starts a request soonest. Pure: filter, score, pick.

The prediction is the time to the first token: what waits there already, a place in the batch and in the KV cache, the
adapter's load if it is absent, and the steps that carry the request's own prefill. The plan is a prior: it decides
between engines that are about equally good, no more.
"""

from collections.abc import Mapping

import numpy as np

from loraserve.cost import CostModel
from loraserve.messages import Rejected, Route
from loraserve.router.choice import Candidate, Choice, Rng, Seconds, Slo, rejected
from loraserve.router.filters import able_columns, no_engine, unfit
from loraserve.router.pick import MOST_CANDIDATES, choice_of, near_ties, suspects_last
from loraserve.router.score import Scores, score
from loraserve.router.shares import PlannedCopies, shares_of
from loraserve.router.table import PriceTable
from loraserve.router.view import ClusterView

__all__ = [
    "MOST_CANDIDATES",
    "Candidate",
    "Choice",
    "PlannedCopies",
    "Rng",
    "Seconds",
    "Slo",
    "route",
    "shares_by_column",
]


def route(
    request: Route, view: ClusterView, plan: PlannedCopies | None, cost: CostModel, slo: Slo, rng: Rng
) -> Choice | Rejected:
    """Engines in the order in which they should be asked, or why none."""
    table = view.prices(cost)
    if not table.engines:
        return no_engine(request)
    able = able_columns(request, table)
    if able is not None and not able.any():
        return unfit(request, table)
    shares = shares_by_column(plan, request, view)
    scores = score(request, view, table, shares, cost)
    if able is not None:
        scores.score[~able] = scores.ttft_s[~able] = np.inf
    ranked = suspects_last(scores.score, table)
    best = int(ranked.argmin())
    # Where it is in time, so is the soonest.
    if table.suspects or scores.ttft_s.item(best) > slo.ttft_s * slo.reject_factor:
        refusal = _overloaded(scores, table, cost, slo)
        if refusal is not None:
            return refusal
    first = near_ties(ranked, best, scores, table, rng)
    return choice_of(first, ranked, view, table, scores, cost)


def shares_by_column(plan: PlannedCopies | None, request: Route, view: ClusterView) -> Mapping[int, float]:
    """Of the planned copies at engines that take requests."""
    shares: dict[int, float] = {}
    for name, share in shares_of(plan, request).items():
        engine = view.engines.get(name)
        if engine is not None and engine.column >= 0 and share > 0:
            shares[engine.column] = share
    return shares


def _overloaded(scores: Scores, table: PriceTable, cost: CostModel, slo: Slo) -> Rejected | None:
    """Where every engine would break the promise by the factor; one that is drained or silent is idle for nobody, and
    counts only where there is no other. A prompt that alone takes longer than the SLO is promised no more than that:
    coming back later would not help it."""
    soonest = int(suspects_last(scores.ttft_s, table).argmin())
    soonest_s = scores.ttft_s.item(soonest)
    if soonest_s <= slo.ttft_s * slo.reject_factor:
        return None
    alone_s = scores.own_s.item(soonest)
    if scores.request.adapter is not None and scores.load_s[soonest] > 0:
        alone_s += cost.load_s(scores.request.adapter.slab_bytes)
    promised_s = max(slo.ttft_s, alone_s)
    if soonest_s <= promised_s * slo.reject_factor:
        return None
    text = f"every engine would take {soonest_s:.0f} s or more to start this request; try again later"
    return rejected(scores.request, "overloaded", text, retry_after_s=soonest_s - promised_s)
