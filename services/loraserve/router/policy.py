"""Which engine starts a request soonest. Pure: filter, score, pick.

The prediction is the time to the first token: what waits there already, a place in the batch and in the KV cache, the
adapter's load if it is absent, and the steps that carry the request's own prefill. The plan is a prior: it decides
between engines that are about equally good, no more.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from loraserve.cost import CostModel, extent_bytes
from loraserve.messages import Expect, Rejected, Route, SamplingParams
from loraserve.router.context import Candidate, Choice, PlannedCopies, Rng, Seconds, Slo, rejected, shares_of
from loraserve.router.prices import Array, PriceTable
from loraserve.router.score import Scores, engine_seconds, own_seconds, prefill_tokens, score
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


# MERGED: loraserve.router.policy
# """From scores to the engines that are asked, best first, and why. Pure."""


MOST_CANDIDATES = 4
"""Whoever does not answer costs a second, and gateways do not wait for ever."""
NEAR = 0.05
"""Scores within this share of the best's time, or of a step, are a tie: the prediction's error is larger."""
LEAST_TIE_S = 5e-5
SUSPECT_S = 1e9
"""Added to the score of an engine that does not answer, or is drained: it is asked after all others."""


def near_ties(ranked: Array, best: int, scores: Scores, table: PriceTable, rng: Rng) -> list[int]:
    """The best by lot, so that equal engines share the load.

    Among near-ties a copy of the plan wins: a long queue makes what the plan is worth smaller than the tie.
    """
    tie_s = NEAR * max(scores.ttft_s.item(best), table.columns.decode_step_s.item(best)) + LEAST_TIE_S
    near = (ranked <= np.array(ranked.item(best) + tie_s)).nonzero()[0].tolist()
    return near if len(near) == 1 else by_lot(near, scores.shares, rng)


def suspects_last(score: Array, table: PriceTable) -> Array:
    return score + table.columns.avoided * SUSPECT_S if table.suspects else score


def by_lot(columns: Sequence[int], shares: Mapping[int, float], rng: Rng) -> list[int]:
    """At most as many as are asked: those with a share first, a larger one more often; without any, all alike."""
    planned = [column for column in columns if column in shares]
    if not planned:
        return _shuffled(columns, rng)
    # Each comes first with a probability in proportion to its share (Efraimidis and Spirakis, 2006).
    planned.sort(key=lambda column: rng.random() ** (1 / shares[column]), reverse=True)
    return [*planned, *(column for column in columns if column not in shares)][:MOST_CANDIDATES]


def _shuffled(columns: Sequence[int], rng: Rng) -> list[int]:
    """The first few of a random order."""
    rest = list(columns)
    count = min(len(rest), MOST_CANDIDATES)
    for place in range(count):
        other = place + int(rng.random() * (len(rest) - place))
        rest[place], rest[other] = rest[other], rest[place]
    return rest[:count]


def _next_best(ranked: Array, first: Sequence[int]) -> list[int]:
    """Those that come after the first; without those that are out of the question."""
    rest, found = ranked.copy(), list[int]()
    rest[first] = np.inf
    while len(first) + len(found) < MOST_CANDIDATES:
        column = int(rest.argmin())
        if rest.item(column) == np.inf:
            break
        found.append(column)
        rest[column] = np.inf
    return found


def choice_of(
    columns: Sequence[int], ranked: Array | None, view: ClusterView, table: PriceTable, scores: Scores, cost: CostModel
) -> Choice:
    """These and then the best by ``ranked``, each with its prediction and why. Who has the request already comes first.

    Others than the first are worked out when they are asked for, from what was known when the first was chosen.
    """
    first = _column_of_live(view, scores)
    if first is not None:
        why = "live"
    else:
        first = columns[0]
        why = "prefix" if _prefix_decided(first, table, scores, cost) else _why(first, scores)
    return Choice(_candidate(first, why, scores), partial(_others, first, columns, ranked, scores))


def _others(first: int, columns: Sequence[int], ranked: Array | None, scores: Scores) -> tuple[Candidate, ...]:
    more = _next_best(ranked, columns) if ranked is not None else []
    rest = [column for column in (*columns, *more) if column != first][: MOST_CANDIDATES - 1]
    return tuple(_candidate(column, _why(column, scores), scores) for column in rest)


def _candidate(column: int, why: str, scores: Scores) -> Candidate:
    parts = Seconds(
        scores.queue_s.item(column),
        scores.load_s.item(column),
        scores.own_s.item(column),
        scores.step_s.item(column),
        scores.engine_s.item(column),
    )
    return Candidate(scores.engines[column].name, scores.ttft_s.item(column), why, parts)


def _column_of_live(view: ClusterView, scores: Scores) -> int | None:
    live = view.live.get(scores.request.request_id)
    if live is None or live.engine not in view.engines:
        return None
    column = view.engines[live.engine].column
    return column if column >= 0 and scores.score[column] < np.inf else None


def _why(column: int, scores: Scores) -> str:
    if scores.request.adapter is None:
        return "base"
    if column in scores.near.resident or column in scores.near.begun:
        return "planned" if column in scores.shares else "resident"
    return "spill" if scores.near.resident else "load"


def _prefix_decided(column: int, table: PriceTable, scores: Scores, cost: CostModel) -> bool:
    """Whether it has some of the prompt, and another would be the best if nothing of it were there."""
    if column not in scores.saved_tokens:
        return False
    tokens = prefill_tokens(scores.request, table, {})
    _, own_s = own_seconds(scores.request, scores.near, table, cost, tokens)
    further_s = engine_seconds(scores.request, scores.near, table, cost, tokens) - scores.engine_s
    without = suspects_last(scores.score + (own_s - scores.own_s) + further_s * table.harm_weight, table)
    return bool(without[column] > without.min())


# MERGED: loraserve.router.policy
# """Which engines could serve a request at all, and in which words it is refused where none can. Pure."""


Mask = npt.NDArray[np.bool_]


def able_columns(request: Route, table: PriceTable) -> Mask | None:
    """Where the context and, by size, the adapter fit; None where that is everywhere."""
    tokens = len(request.prompt_tokens)
    # Extents are of whole granules, so that a slab that is no larger than one fits into it.
    slab_bytes = request.adapter.slab_bytes if request.adapter is not None else 0
    if tokens < table.least_longest_tokens and slab_bytes <= table.least_extent_bytes:
        return None
    columns = table.columns
    return (columns.longest_tokens > tokens) & (columns.largest_extent_bytes >= slab_bytes)


def no_engine(request: Route) -> Rejected:
    return rejected(request, "no_engine", "no engine is ready; try again in a moment")


def unfit(request: Route, table: PriceTable) -> Rejected:
    """No ready engine is able."""
    length = len(request.prompt_tokens)
    longest = float(table.columns.longest_tokens.max())
    if longest <= length:
        text = (
            f"This model's maximum context length is {longest:.0f} tokens. However, your prompt has {length}; "
            "shorten it."
        )
        return rejected(request, "context_length", text)
    assert request.adapter is not None
    text = (
        f"adapter {request.adapter.name} needs an extent of {extent_bytes(request.adapter.slab_bytes)} bytes, more "
        "than the pool of any engine that is ready can give; raise engine.pool_bytes"
    )
    return rejected(request, "adapter_unavailable", text)


# MERGED: loraserve.router.policy
# """The paper's routing: a copy is drawn by the plan's shares, whatever waits there. Pure.
#
# A copy that is planned and not there yet is loaded by the request that comes for it. What is
# predicted is for people to read: it decides nothing.
# """


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


# MERGED: loraserve.router.policy
# """Ways to route, by the name that the configuration gives them. Pure."""


Router: TypeAlias = Callable[[Route, ClusterView, PlannedCopies | None, CostModel, Slo, Rng], Choice | Rejected]

ROUTERS: Mapping[str, Router] = {"predicted": route, "shares": route_by_shares}


# MERGED: loraserve.router.policy
# """Where an adapter should be on its way to while the request for it is still being made. Pure."""


UNKNOWN = SamplingParams(max_tokens=1 << 30)
"""Its output is taken to be as long as the mean."""


def expected_at(
    expect: Expect, view: ClusterView, plan: PlannedCopies | None, cost: CostModel, slo: Slo, rng: Rng
) -> str | None:
    """The engine where such a request would go now; None where the adapter is there or on its way, and where it would
    be refused. Nothing is known of the prompt's text, so that no engine is taken to know its beginning."""
    nobody = Route(
        request_id="",
        gateway="",
        prompt_tokens=(-1,) * max(1, expect.prompt_tokens),
        sampling=UNKNOWN,
        adapter=expect.adapter,
    )
    choice = route(nobody, view, plan, cost, slo, rng)
    if isinstance(choice, Rejected):
        return None
    engine = choice.first.engine
    return None if view.engines[engine].has(expect.adapter.version) else engine
