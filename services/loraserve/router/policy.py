"""Which engine starts a request soonest. Pure: filter, score, pick.

The score is the predicted time to the first token: what waits there already, the step that runs, the adapter's load if
it is absent, this prompt. The plan is a prior: it decides between engines that are about equally good, no more.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from loraserve.cost import CostModel
from loraserve.messages import AdapterRef, Plan, Rejected, Route
from loraserve.router.view import EngineView

if TYPE_CHECKING:
    from random import Random

NEAR = 1.05
"""Predictions within this factor of the best are a tie: their error is larger."""
FULL_KV = 0.05
"""Share of free KV blocks below which a new request is likely to wait for others to end."""


class Candidate(msgspec.Struct, frozen=True):
    """An engine that can serve the request, what it is predicted to take, and why it would be chosen."""

    engine: str
    predicted_s: float
    why: str


class Choice(msgspec.Struct, frozen=True):
    """Engines to try, best first."""

    candidates: tuple[Candidate, ...]


class Slo(msgspec.Struct, frozen=True):
    """Beyond ``ttft_s`` times ``reject_factor`` it is kinder to refuse."""

    ttft_s: float
    reject_factor: float


def route(
    request: Route, engines: Sequence[EngineView], plan: Plan | None, cost: CostModel, slo: Slo, rng: "Random"
) -> Choice | Rejected:
    """Engines in the order of their predicted start, or why none."""
    if not engines:
        return Rejected(
            request_id=request.request_id,
            code="no_engine",
            message="no engine is ready; try again in a moment",
        )
    able = [view for view in engines if _can_ever(view, request)]
    if not able:
        return _unfit(request, engines)
    scored = sorted((_score(view, request, plan, cost) for view in able), key=lambda c: (c.predicted_s, c.engine))
    best = scored[0].predicted_s
    if best > slo.ttft_s * slo.reject_factor:
        return Rejected(
            request_id=request.request_id,
            code="overloaded",
            message=f"every engine would take {best:.0f} s or more to start; the limit is "
            f"{slo.ttft_s * slo.reject_factor:.0f} s",
            retry_after_s=best - slo.ttft_s,
        )
    return Choice(tuple(_settle_ties(scored, request, plan, rng)))


def _can_ever(view: EngineView, request: Route) -> bool:
    fits = view.load.max_model_tokens == 0 or len(request.prompt_tokens) < view.load.max_model_tokens
    return fits and (request.adapter is None or request.adapter.slab_bytes <= view.load.pool_total_bytes)


def _unfit(request: Route, engines: Sequence[EngineView]) -> Rejected:
    longest = max(view.load.max_model_tokens for view in engines)
    length = len(request.prompt_tokens)
    if length >= longest > 0:
        code = "context_length"
        text = (
            f"This model's maximum context length is {longest} tokens. However, your prompt has {length} tokens; "
            "shorten it."
        )
    else:
        code, text = "adapter_unavailable", "the adapter is larger than any engine's pool; raise engine.pool_bytes"
    return Rejected(request_id=request.request_id, code=code, message=text)


def _score(view: EngineView, request: Route, plan: Plan | None, cost: CostModel) -> Candidate:
    measured = cost.measured_by(view.load)
    own_s = len(request.prompt_tokens) * measured.prefill_token_s
    queue_s = view.waiting_prefill_tokens * measured.prefill_token_s + _wait_for_room_s(view, measured)
    load_s, why = _load_s(view, request.adapter, measured)
    # Loading and waiting run side by side; neither makes the other longer.
    start_s = max(queue_s, load_s) + measured.decode_step_s * (1 + view.requests / max(1, view.load.max_running))
    if why == "load" and _planned(plan, request, view.load.engine):
        why = "planned"
    return Candidate(view.load.engine, start_s + own_s, why)


def _load_s(view: EngineView, adapter: AdapterRef | None, cost: CostModel) -> tuple[float, str]:
    if adapter is None:
        return 0.0, "base"
    if view.holds(adapter.version):
        return 0.0, "resident"
    if view.fetching(adapter.version):
        return cost.load_adapter_s(adapter.slab_bytes) / 2, "loading"
    return cost.load_adapter_s(adapter.slab_bytes), "load"


def _wait_for_room_s(view: EngineView, cost: CostModel) -> float:
    """Requests beyond what may run wait for one to end: a few dozen steps each, by lack of a better guess."""
    steps_a_request = 64
    excess = view.requests + 1 - view.load.max_running
    blocked = view.load.kv_blocks_free < FULL_KV * view.load.kv_blocks_total
    turns = max(excess, 0) / max(1, view.load.max_running) + (1.0 if blocked and view.requests else 0.0)
    return turns * steps_a_request * cost.decode_step_s


def _planned(plan: Plan | None, request: Route, engine: str) -> bool:
    version = request.adapter.version if request.adapter else None
    return plan is not None and any(p.version == version and p.engine == engine for p in plan.placements)


def _settle_ties(scored: list[Candidate], request: Route, plan: Plan | None, rng: "Random") -> list[Candidate]:
    """Among the nearly best: residents and planned copies first, then by lot, so that equal engines share the load."""
    near = [c for c in scored if c.predicted_s <= scored[0].predicted_s * NEAR]
    rng.shuffle(near)
    near.sort(key=lambda c: not (c.why == "resident" or _planned(plan, request, c.engine)))
    rest = [c for c in scored if c not in near]
    away = near[0].why == "load" and any(c.why == "resident" for c in scored)
    first = msgspec.structs.replace(near[0], why="spill") if away else near[0]
    return [first, *near[1:], *rest]
