"""The choice of an engine for a request.

``route_by_prediction`` (setting ``predicted``, the default) decides in four steps, in the order of this module:

1. Filter: exclude engines whose context length or adapter pool is too small, and those that failed an earlier attempt
   of a migrated request (``_filter``).
2. Score: compute a score in seconds for each engine, mostly its predicted time to first token (``score.score``).
3. Admit: refuse the request if every engine would take too long to start it (``_reject_overloaded``). Migrated
   requests are not refused, because the cluster has accepted them already.
4. Pick: take the engine with the lowest score. ``break_ties`` orders engines with nearly equal scores.

``route_by_shares`` (setting ``shares``) is the LoRAServe paper's routing. It draws a planned copy in proportion to the
traffic shares and ignores queues.

An engine drained by the plan or avoided after two timeouts is a *fallback*. The router asks it after all others.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from loraserve.cost import CostModel, extent_bytes
from loraserve.messages import Expect, Rejected, Route, SamplingParams
from loraserve.router.context import Candidate, Candidates, Prediction, Rng, RoutingContext, Slo
from loraserve.router.prices import Array, PriceTable
from loraserve.router.score import Scores, engine_seconds, prefill_seconds, prefill_tokens, score
from loraserve.router.view import ClusterView

Mask: TypeAlias = npt.NDArray[np.bool_]
RoutingPolicy: TypeAlias = Callable[[RoutingContext], Candidates | Rejected]

MAX_CANDIDATES = 4
"""Maximum number of engines to ask. Each timeout takes ``router.admit_timeout_s``, and gateways do not wait long."""
TIE_SHARE = 0.05
"""Scores within this fraction count as equal (``break_ties``). Predictions are not exact enough to separate them."""
MIN_TIE_S = 5e-5
FALLBACK_PENALTY_S = 1e9
"""Added to a fallback engine's score for each level of ``EngineView.fallback_level``."""


def route_by_prediction(context: RoutingContext) -> Candidates | Rejected:
    """Return the engines to ask, best score first, or a refusal."""
    slo, table = context.slo, context.view.prices(context.cost)
    scores = _filter_and_score(context, table)
    if isinstance(scores, Rejected):
        return scores
    ranked = put_fallbacks_last(scores.score, table)
    best = int(ranked.argmin())
    # If the engine with the best score is in time, no refusal is possible, so the check is skipped.
    is_slow = table.fallbacks or scores.ttft_s.item(best) > slo.ttft_s * slo.reject_factor
    if is_slow and not _is_migrated(context.request):
        refusal = _reject_overloaded(scores, table, context.cost, slo)
        if refusal is not None:
            return refusal
    first = break_ties(ranked, best, scores, table, context.rng)
    return _candidates(context, table, scores, first, ranked)


def route_by_shares(context: RoutingContext) -> Candidates | Rejected:
    """Return the engines with planned copies in an order drawn by their shares, then other engines in random order.

    Fallback engines come last. If a planned copy is not loaded yet, the request starts its load. The scores only
    exclude engines that cannot serve the request, and appear in logs.
    """
    table = context.view.prices(context.cost)
    scores = _filter_and_score(context, table)
    if isinstance(scores, Rejected):
        return scores
    columns = (scores.score < np.inf).nonzero()[0].tolist()
    chosen: list[int] = []
    for planned, fallback in ((True, False), (False, False), (True, True), (False, True)):
        if len(chosen) < MAX_CANDIDATES:
            group = [c for c in columns if (c in scores.shares) == planned and (c in table.fallbacks) == fallback]
            chosen += _draw_by_share(group, scores.shares, context.rng)
    return _candidates(context, table, scores, chosen, None)


POLICIES: Mapping[str, RoutingPolicy] = {"predicted": route_by_prediction, "shares": route_by_shares}
"""The policies by their names in the configuration (``router.policy``)."""


# Filter and score


def _filter_and_score(context: RoutingContext, table: PriceTable) -> Scores | Rejected:
    """Return the scores, which are infinite for engines that cannot serve the request, or a refusal if none can."""
    fitting = _filter(context.request, table)
    if isinstance(fitting, Rejected):
        return fitting
    scores = score(context, table, _shares_by_column(context))
    if fitting is not None:
        scores.score[~fitting] = scores.ttft_s[~fitting] = np.inf
    return scores


def _filter(request: Route, table: PriceTable) -> Mask | Rejected | None:
    """Return a mask of the engines that can serve the request, None if all can, or a refusal if none can."""
    if not table.engines:
        text = "no engine is ready; try again in a moment"
        return Rejected(request_id=request.request_id, code="no_engine", message=text)
    tokens = len(request.prompt_tokens)
    # Extents are whole granules, so every slab up to the size of the largest extent fits into it.
    slab_bytes = request.adapter.slab_bytes if request.adapter is not None else 0
    if not request.avoid and tokens < table.min_context_tokens and slab_bytes <= table.min_extent_bytes:
        return None
    columns = table.columns
    fitting = (columns.context_tokens > tokens) & (columns.largest_extent_bytes >= slab_bytes)
    if fitting.any():
        others = fitting & [engine.name not in request.avoid for engine in table.engines]
        return others if others.any() else fitting
    context_tokens = float(columns.context_tokens.max())
    if context_tokens <= tokens:
        text = (
            f"This model's maximum context length is {context_tokens:.0f} tokens. However, your prompt has {tokens}; "
            "shorten it."
        )
        return Rejected(request_id=request.request_id, code="context_length", message=text)
    assert request.adapter is not None
    text = (
        f"adapter {request.adapter.name} needs an extent of {extent_bytes(slab_bytes)} bytes, more than the pool of "
        "any ready engine can provide; raise engine.pool_bytes"
    )
    return Rejected(request_id=request.request_id, code="adapter_unavailable", message=text)


def _shares_by_column(context: RoutingContext) -> Mapping[int, float]:
    """Return the traffic shares of the adapter's planned copies on ready engines, by column."""
    shares: dict[int, float] = {}
    for name, share in context.planned_shares().items():
        engine = context.view.engines.get(name)
        if engine is not None and engine.column >= 0 and share > 0:
            shares[engine.column] = share
    return shares


# Admit


def _is_migrated(request: Route) -> bool:
    return bool(request.generated or request.avoid)


def _reject_overloaded(scores: Scores, table: PriceTable, cost: CostModel, slo: Slo) -> Rejected | None:
    """Return a refusal if every engine would take longer than ``reject_factor`` times the target TTFT.

    The target is the SLO, or the time of the request's own prefill and adapter load if that is longer, because a later
    retry would need that time too. Fallback engines count only if there are no others.
    """
    soonest = int(put_fallbacks_last(scores.ttft_s, table).argmin())
    soonest_s = scores.ttft_s.item(soonest)
    if soonest_s <= slo.ttft_s * slo.reject_factor:
        return None
    alone_s = scores.own_s.item(soonest)
    if scores.request.adapter is not None and scores.load_s[soonest] > 0:
        alone_s += cost.load_s(scores.request.adapter.slab_bytes)
    target_s = max(slo.ttft_s, alone_s)
    if soonest_s <= target_s * slo.reject_factor:
        return None
    return Rejected(
        request_id=scores.request.request_id,
        code="overloaded",
        message=f"every engine would need {soonest_s:.0f} s or more to start this request; try again later",
        retry_after_s=max(1.0, soonest_s - target_s),
    )


# Pick


def put_fallbacks_last(score: Array, table: PriceTable) -> Array:
    """Return the scores with the penalty of fallback engines added."""
    return score + table.columns.fallback_level * FALLBACK_PENALTY_S if table.fallbacks else score


def break_ties(ranked: Array, best: int, scores: Scores, table: PriceTable, rng: Rng) -> list[int]:
    """Return the columns of the engines that tie with the best one, in the order in which they are asked.

    - A score ties if it exceeds the best one by at most ``MIN_TIE_S`` plus ``TIE_SHARE`` of the best engine's predicted
      TTFT, or of its decode step if that is longer.
    - Tied engines with a planned copy come first, in an order drawn in proportion to their traffic shares. The other
      tied engines follow by name.
    - If no tied engine has a planned copy, the order is uniformly random.

    At most ``MAX_CANDIDATES`` columns are returned. Engines that do not tie are asked later (``_other_candidates``).
    """
    tie_s = TIE_SHARE * max(scores.ttft_s.item(best), table.columns.decode_step_s.item(best)) + MIN_TIE_S
    tied = (ranked <= np.array(ranked.item(best) + tie_s)).nonzero()[0].tolist()
    return tied if len(tied) == 1 else _draw_by_share(tied, scores.shares, rng)


def _draw_by_share(columns: Sequence[int], shares: Mapping[int, float], rng: Rng) -> list[int]:
    """Return up to ``MAX_CANDIDATES`` columns.

    Columns with a share come first, drawn in proportion to their shares. The others follow in the given order. If no
    column has a share, the order is uniformly random.
    """
    planned = [column for column in columns if column in shares]
    if planned:
        # Each column is first with a probability proportional to its share (Efraimidis and Spirakis, 2006).
        planned.sort(key=lambda column: rng.random() ** (1 / shares[column]), reverse=True)
        return [*planned, *(column for column in columns if column not in shares)][:MAX_CANDIDATES]
    order = list(columns)
    for place in range(min(len(order), MAX_CANDIDATES)):
        other = place + int(rng.random() * (len(order) - place))
        order[place], order[other] = order[other], order[place]
    return order[:MAX_CANDIDATES]


def _candidates(
    context: RoutingContext, table: PriceTable, scores: Scores, columns: Sequence[int], ranked: Array | None
) -> Candidates:
    """Return the candidates: an engine that already runs the request, then ``columns``, then others by score.

    ``ranked`` are the scores of all engines, which order the others. If it is None, there are no others. Candidates
    after the first are computed on demand.
    """
    first = _column_of_running(context.view, scores)
    if first is not None:
        why = "live"
    else:
        first = columns[0]
        why = "prefix" if _prefix_decided(first, table, scores, context.cost) else _why(first, scores)
    return Candidates(_candidate(first, why, scores), partial(_other_candidates, first, columns, ranked, scores))


def _other_candidates(
    first: int, columns: Sequence[int], ranked: Array | None, scores: Scores
) -> tuple[Candidate, ...]:
    """Return the candidates after the first one. The sort is stable, so engines with equal scores follow by name."""
    by_score = [] if ranked is None else ranked.argsort(kind="stable").tolist()
    others = dict.fromkeys((*columns, *by_score))
    others.pop(first, None)
    fitting = [column for column in others if scores.score[column] < np.inf][: MAX_CANDIDATES - 1]
    return tuple(_candidate(column, _why(column, scores), scores) for column in fitting)


def _candidate(column: int, why: str, scores: Scores) -> Candidate:
    terms = (scores.queue_s, scores.load_s, scores.own_s, scores.step_s, scores.engine_s)
    prediction = Prediction(*(term.item(column) for term in terms))
    return Candidate(scores.engines[column].name, scores.ttft_s.item(column), why, prediction)


def _column_of_running(view: ClusterView, scores: Scores) -> int | None:
    """Return the column of the ready engine that already runs the request, or None."""
    running = view.running.get(scores.request.request_id)
    if running is None or running.engine not in view.engines:
        return None
    column = view.engines[running.engine].column
    return column if column >= 0 and scores.score[column] < np.inf else None


def _why(column: int, scores: Scores) -> str:
    if scores.request.adapter is None:
        return "base"
    if column in scores.adapter_columns.resident or column in scores.adapter_columns.loading:
        return "planned" if column in scores.shares else "resident"
    return "spill" if scores.adapter_columns.resident else "load"


def _prefix_decided(column: int, table: PriceTable, scores: Scores, cost: CostModel) -> bool:
    """Return whether the engine has cached a prefix and would not have the best score if no engine had one."""
    if column not in scores.cached_tokens:
        return False
    tokens = prefill_tokens(scores.request, table, {})
    _, own_s = prefill_seconds(scores.request, scores.adapter_columns, table, cost, tokens)
    further_s = engine_seconds(scores.request, scores.adapter_columns, table, cost, tokens) - scores.engine_s
    without = put_fallbacks_last(
        scores.score + (own_s - scores.own_s) + further_s * table.columns.engine_time_weight, table
    )
    return bool(without[column] > without.min())


# Prefetch


def placeholder_request(expect: Expect) -> Route:
    """Return a stand-in for an announced request: its prompt has the announced length and invalid tokens."""
    return Route(
        request_id="",
        gateway="",
        # No real prompt contains token -1, so no engine has a prefix of this one cached.
        prompt_tokens=(-1,) * max(1, expect.prompt_tokens),
        # Without a limit, the output is assumed to have the mean length.
        sampling=SamplingParams(max_tokens=1 << 30),
        adapter=expect.adapter,
    )


def prefetch_engine(context: RoutingContext) -> str | None:
    """Return the engine that should start to load the adapter of ``placeholder_request`` now.

    Return None if the request would be refused, or if the chosen engine already holds or loads the adapter.
    """
    choice = route_by_prediction(context)
    if isinstance(choice, Rejected) or context.request.adapter is None:
        return None
    engine = choice.first.engine
    return None if context.view.engines[engine].has(context.request.adapter.version) else engine
