"""Which engine starts a request soonest. Pure: filter, score, pick.

The prediction is the time until the request's own prefill begins: what waits there already, a place in the batch and in
the KV cache, the adapter's load if it is absent. The plan is a prior: it decides between engines that are about equally
good, no more.
"""

from collections.abc import Mapping
from heapq import nsmallest
from typing import Protocol

import msgspec

from loraserve.cost import CostModel, StepShape, extent_bytes
from loraserve.messages import AdapterRef, Plan, Rejected, Route
from loraserve.router.view import ClusterView, EngineView

MOST_CANDIDATES = 8
NEAR = 0.05
"""Scores within this share of the best, or of a step, are a tie: the prediction's error is larger."""
PRIOR_STEPS = 0.5
"""What a planned copy, and one that is there already, is worth in steps: enough to settle what is nearly a tie."""
LOAD_HARM = 0.5
"""A load takes room and bandwidth from others at the engine too: this share of its time is added to the score."""


class Candidate(msgspec.Struct, frozen=True):
    """An engine that can serve the request, its predicted start, and why it would be chosen.

    ``why``: ``base`` (no adapter), ``planned`` (holds a copy by plan), ``resident`` (holds one by chance), ``spill``
    (others hold it, but this one starts sooner), ``load`` (nobody holds it), ``live`` (has the request already).
    """

    engine: str
    predicted_s: float
    why: str


class Choice(msgspec.Struct, frozen=True):
    """Engines to try, best first."""

    candidates: tuple[Candidate, ...]


class Slo(msgspec.Struct, frozen=True):
    """Where the soonest start is later than ``ttft_s`` times ``reject_factor`` it is kinder to refuse."""

    ttft_s: float
    reject_factor: float


class Rng(Protocol):
    """As random.Random."""

    def random(self) -> float: ...


class PlannedCopies:
    """A plan as the router looks it up: the share of traffic of each copy."""

    def __init__(self, plan: Plan) -> None:
        self.epoch = plan.epoch
        self._shares: dict[str, dict[str, float]] = {}
        for copy in plan.placements:
            self._shares.setdefault(copy.version, {})[copy.engine] = copy.share

    def of(self, version: str) -> Mapping[str, float]:
        """Share by engine of one adapter's copies."""
        return self._shares.get(version, _NOWHERE)


_NOWHERE: Mapping[str, float] = {}


class _Scored(msgspec.Struct):
    view: EngineView
    start_s: float
    score: float
    share: float


def route(
    request: Route, view: ClusterView, plan: PlannedCopies | None, cost: CostModel, slo: Slo, rng: Rng
) -> Choice | Rejected:
    """Engines in the order in which they should be asked, or why none."""
    ready = view.ready()
    if not ready:
        return _rejected(request, "no_engine", "no engine is ready; try again in a moment")
    able = [engine for engine in ready if _can_ever(engine, request)]
    if not able:
        return _unfit(request, ready)
    shares = plan.of(request.adapter.version) if plan and request.adapter else _NOWHERE
    scored = [_score(engine, request, shares.get(engine.name, 0.0), cost, view.output_tokens) for engine in able]
    soonest_s = min(s.start_s for s in scored)
    if soonest_s > slo.ttft_s * slo.reject_factor:
        text = f"every engine would take {soonest_s:.0f} s or more to start this request; try again later"
        return _rejected(request, "overloaded", text, retry_after_s=soonest_s - slo.ttft_s)
    return Choice(tuple(_order(scored, request, view, rng)))


def _can_ever(engine: EngineView, request: Route) -> bool:
    """Whether the context and, by size, the adapter fit at all."""
    longest = engine.load.max_model_tokens
    if longest and len(request.prompt_tokens) >= longest:
        return False
    return request.adapter is None or extent_bytes(request.adapter.slab_bytes) <= engine.largest_extent_bytes


def _unfit(request: Route, engines: list[EngineView]) -> Rejected:
    length = len(request.prompt_tokens)
    if all(0 < engine.load.max_model_tokens <= length for engine in engines):
        longest = max(engine.load.max_model_tokens for engine in engines)
        text = (
            f"This model's maximum context length is {longest} tokens. However, your prompt has {length}; shorten it."
        )
        return _rejected(request, "context_length", text)
    assert request.adapter is not None
    text = (
        f"adapter {request.adapter.name} needs an extent of {extent_bytes(request.adapter.slab_bytes)} bytes, more "
        "than the pool of any engine that is ready can give; raise engine.pool_bytes"
    )
    return _rejected(request, "adapter_unavailable", text)


def _rejected(request: Route, code: str, message: str, retry_after_s: float = 1.0) -> Rejected:
    return Rejected(request_id=request.request_id, code=code, message=message, retry_after_s=max(1.0, retry_after_s))


def _score(engine: EngineView, request: Route, share: float, cost: CostModel, output_tokens: float) -> _Scored:
    load = engine.load
    requests = engine.requests
    step_s = load.decode_step_s or cost.step_s(StepShape(decode_sequences=requests))
    prefill_token_s = 1 / load.prefill_tokens_per_s if load.prefill_tokens_per_s else cost.prefill_token_s
    queue_s = (load.waiting_prefill_tokens + engine.pending_tokens) * prefill_token_s
    prior = step_s * PRIOR_STEPS if share else 0.0
    fetch_s = 0.0
    if request.adapter is not None:
        if request.adapter.version in engine.resident:
            prior += step_s * PRIOR_STEPS
        else:
            fetch_s = _fetch_s(engine, request.adapter, cost, output_tokens * step_s)
    if requests:
        queue_s += step_s + len(engine.pending) * cost.sequence_s
        queue_s += _wait_for_place_s(engine, len(request.prompt_tokens), output_tokens * step_s)
    # It loads while it waits in the queue; neither makes the other longer.
    start_s = max(queue_s, fetch_s)
    return _Scored(engine, start_s, start_s + LOAD_HARM * fetch_s - prior, share)


def _fetch_s(engine: EngineView, adapter: AdapterRef, cost: CostModel, request_s: float) -> float:
    """Until an absent adapter is there: its load, after those on their way, and a wait where the pool is in use."""
    rate = engine.load.load_bytes_per_s
    load_s = cost.load_base_s + adapter.slab_bytes / rate if rate else cost.load_s(adapter.slab_bytes)
    if engine.fetches(adapter.version):
        return load_s / 2
    wait_s = request_s if extent_bytes(adapter.slab_bytes) > engine.room_bytes else 0.0
    return wait_s + load_s * (1 + len(engine.loading) / 2)


def _wait_for_place_s(engine: EngineView, prompt_tokens: int, request_s: float) -> float:
    """Until enough of the running requests, which take ``request_s`` each, have ended."""
    load = engine.load
    wait_s = 0.0
    excess = engine.requests + 1 - load.max_running
    if excess > 0 and load.max_running:
        wait_s = excess / load.max_running * request_s
    used_blocks = load.kv_blocks_total - load.kv_blocks_free
    if used_blocks:
        tokens = prompt_tokens + 1 + engine.pending_tokens + load.waiting_prefill_tokens
        missing_blocks = tokens / load.block_tokens - load.kv_blocks_free
        if missing_blocks > 0:
            wait_s = max(wait_s, missing_blocks / used_blocks * request_s)
    return wait_s


def _order(scored: list[_Scored], request: Route, view: ClusterView, rng: Rng) -> list[Candidate]:
    """Has it already; then by score, near-ties by lot so that equal engines share the load; suspects last.

    Among near-ties a copy of the plan wins: a long queue makes what the plan is worth smaller than the tie.
    """
    trusted = [s for s in scored if s.view.avoided_since_s is None] or scored
    best = min(trusted, key=lambda s: s.score)
    bar = best.score + NEAR * max(best.start_s, best.view.load.decode_step_s, 0.001)
    planned = any(s.share for s in scored)
    has_it = view.live[request.request_id].engine if request.request_id in view.live else ""

    def rank(s: _Scored) -> tuple[bool, bool, float, float]:
        near = s.score <= bar
        # A weighted lot: among equals, a copy with a larger share of the plan's traffic wins more often.
        weight = s.share if planned else 1.0
        lot = -(rng.random() ** (1 / weight)) if near and weight else 0.0
        return s.view.name != has_it, s.view.avoided_since_s is not None, bar if near else s.score, lot

    chosen = nsmallest(MOST_CANDIDATES, scored, key=rank)
    version = request.adapter.version if request.adapter else ""
    held = version != "" and any(version in s.view.resident for s in scored)
    return [
        Candidate(s.view.name, s.start_s, "live" if s.view.name == has_it else _why(s, version, held)) for s in chosen
    ]


def _why(s: _Scored, version: str, held: bool) -> str:
    if not version:
        return "base"
    if version in s.view.resident or version in s.view.loading:
        return "planned" if s.share else "resident"
    return "spill" if held else "load"
