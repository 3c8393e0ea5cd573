"""What a request would see at each engine, and what those there would see of it: one score, in seconds. Pure.

score = predicted time to first token + weight * engine time that it takes + what a load costs others - what a share of
the plan and a copy there are worth.
"""

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from loraserve.cost import CostModel, extent_bytes
from loraserve.messages import AdapterRef, Route
from loraserve.router.engine_view import EngineView
from loraserve.router.prices import Array, PriceTable
from loraserve.router.view import ClusterView

LOAD_HARM = 1.5
"""Of a load's time, added to the score: room and bandwidth are taken from others."""
_LOAD_HARM, _ONE = np.array(LOAD_HARM), np.array(1.0)
# Where there are as few engines as usual, numpy takes twice as long for an array and a number as for two arrays.
PRIOR_STEPS = 0.5
"""What a planned copy, and one that is there already, is worth in steps: enough to settle what is nearly a tie."""


class Near(msgspec.Struct, frozen=True, gc=False):
    """Columns where the request's adapter is, where its load has begun, and where requests with it are."""

    resident: list[int]
    begun: list[int]
    running: list[int]


class Scores(msgspec.Struct, frozen=True, gc=False):
    """Of a request, in arrays by column; ``own_s`` holds ``step_s``. ``saved_tokens`` and ``shares`` by column.

    They stay as they are when the table changes, and ``engines`` those that had the columns then.
    """

    score: Array
    ttft_s: Array
    queue_s: Array
    load_s: Array
    own_s: Array
    step_s: Array
    engine_s: Array
    saved_tokens: Mapping[int, int]
    near: Near
    request: Route
    shares: Mapping[int, float]
    engines: Sequence[EngineView]


def score(request: Route, view: ClusterView, table: PriceTable, shares: Mapping[int, float], cost: CostModel) -> Scores:
    """At every ready engine, those that cannot serve it too. ``shares`` of the plan by column."""
    prices, tokens = table.columns, len(request.prompt_tokens)
    near, saved = columns_near(request, view), _saved_tokens(request, view)
    # What is sent from now on changes the table; a prediction stays as it is.
    queue_s = prices.queue_s.copy()
    if tokens > table.fitting_tokens:
        queue_s = queue_s + np.maximum(prices.kv_wait_token_s * tokens + prices.kv_wait_s, 0.0)
    prefill = prefill_tokens(request, table, saved)
    step_s, own_s = own_seconds(request, near, table, cost, prefill)
    engine_s = engine_seconds(request, near, table, cost, prefill)
    if request.adapter is None:
        load_s = np.zeros(len(table.engines))
        ttft_s = queue_s + own_s
    else:
        load_s = _load_s(request.adapter, near, table)
        # It loads while it waits in the queue; neither makes the other longer.
        ttft_s = np.maximum(queue_s, load_s) + own_s
    total = ttft_s + engine_s * table.harm_weight + load_s * _LOAD_HARM
    _subtract_priors(total, near, table, shares)
    return Scores(total, ttft_s, queue_s, load_s, own_s, step_s, engine_s, saved, near, request, shares, table.engines)


def columns_near(request: Route, view: ClusterView) -> Near:
    near = Near([], [], [])
    if request.adapter is None:
        return near
    version = request.adapter.version
    for engine in view.near(version).values():
        if engine.column < 0:
            continue
        asked_for = version in engine.pending_mix.versions
        if version in engine.resident:
            near.resident.append(engine.column)
        elif asked_for or version in engine.loading or version in engine.expected:
            near.begun.append(engine.column)
        if asked_for or version in engine.active:
            near.running.append(engine.column)
    return near


def own_seconds(request: Route, near: Near, table: PriceTable, cost: CostModel, tokens: Array) -> tuple[Array, Array]:
    """The steps that carry ``tokens`` of its prefill, without and with that prefill: a step holds no more than so many
    tokens, and whoever decodes there decodes in each of them."""
    prices, adapter = table.columns, request.adapter
    token_s = cost.prefill_token_s + len(request.prompt_tokens) / 2 * cost.prefill_kv_token_s
    steps = np.maximum(prices.steps_per_token * tokens, _ONE)
    paced_tokens = prices.pace * tokens
    if cost.lora == "padded":
        rank = np.maximum(prices.rank, _rank(adapter))
        step_s = (rank * prices.step_rank_s + prices.step_s) * steps
        return step_s, step_s + (rank * np.array(cost.padded_prefill_s) + np.array(token_s)) * paced_tokens
    if adapter is None:
        step_s = prices.step_s * steps
        return step_s, step_s + paced_tokens * np.array(token_s)
    slab_s = prices.pace * np.array(adapter.slab_bytes * cost.slab_byte_s)
    for column in near.running:
        slab_s[column] = 0.0
    step_s = (prices.step_s + slab_s) * steps
    return step_s, step_s + paced_tokens * np.array(token_s + adapter.rank * cost.rank_token_s)


def engine_seconds(request: Route, near: Near, table: PriceTable, cost: CostModel, tokens: Array) -> Array:
    """Engine time that the request takes over all of its life: its own, and what others there lose by it. ``tokens`` of
    it need prefill.

    Padded: with a larger rank than the others' it widens them, with a smaller one it is widened itself. The others'
    rank is what is expected there: where a single larger one runs there now, its being the next of its kind would keep
    the engine wide for good. Exact: its slab is read in every step, unless it is read there anyway.
    """
    engine_s: Array
    prices, adapter, prompt_tokens = table.columns, request.adapter, len(request.prompt_tokens)
    # How long it goes on is known no better than by the mean.
    most_tokens, mean_output_tokens = max(1, request.sampling.max_tokens), table.output_tokens
    output_tokens = most_tokens if most_tokens < mean_output_tokens else mean_output_tokens
    token_s = cost.prefill_token_s + prompt_tokens / 2 * cost.prefill_kv_token_s
    decode_s = output_tokens * (cost.sequence_s + (prompt_tokens + output_tokens / 2) * cost.kv_token_s)
    if cost.lora == "padded":
        widest = np.maximum(prices.harm_rank, _rank(adapter))
        engine_s = (widest - prices.harm_rank) * prices.widening_s
        if output_tokens < mean_output_tokens:
            engine_s *= output_tokens / mean_output_tokens
        rank_s = tokens * np.array(cost.padded_prefill_s) + np.array(output_tokens * cost.padded_decode_s)
        engine_s = engine_s + widest * rank_s + (tokens * np.array(token_s) + np.array(decode_s))
        return engine_s
    if adapter is None:
        engine_s = table.ones * (tokens * np.array(token_s) + np.array(decode_s))
        return engine_s
    rank_token_s = adapter.rank * cost.rank_token_s
    engine_s = table.ones * np.array(adapter.slab_bytes * cost.slab_byte_s * output_tokens)
    for column in near.running:
        engine_s[column] = 0.0
    engine_s += tokens * np.array(token_s + rank_token_s) + np.array(decode_s + output_tokens * rank_token_s)
    return engine_s


def _rank(adapter: AdapterRef | None) -> Array:
    return np.array(float(adapter.rank) if adapter is not None else 0.0)


def _load_s(adapter: AdapterRef, near: Near, table: PriceTable) -> Array:
    """Until an absent adapter is there: its load, after those on their way, and a wait where the pool is in use."""
    prices = table.columns
    load_s: Array = prices.load_byte_s * np.array(float(adapter.slab_bytes)) + prices.load_base_s
    for column in near.begun:
        # Some time ago: half of it is left, and it has its room.
        load_s[column] /= 2
    if adapter.slab_bytes > table.fitting_slab_bytes:
        wait_s = (prices.room_bytes < extent_bytes(adapter.slab_bytes)) * prices.room_wait_s
        wait_s[near.begun] = 0.0
        load_s += wait_s
    for column in near.resident:
        load_s[column] = 0.0
    return load_s


def _saved_tokens(request: Route, view: ClusterView) -> Mapping[int, int]:
    cached = view.cached_tokens(request)
    if not cached:
        return {}
    columns = ((view.engines[name].column, tokens) for name, tokens in cached.items() if name in view.engines)
    return {column: tokens for column, tokens in columns if column >= 0}


def prefill_tokens(request: Route, table: PriceTable, saved: Mapping[int, int]) -> Array:
    """Of its prompt, without what is saved: at each engine, or one number where that is nothing."""
    tokens = np.array(float(len(request.prompt_tokens)))
    if not saved:
        return tokens
    left = np.full(len(table.engines), tokens)
    for column, cached in saved.items():
        left[column] -= cached
    return left


def _subtract_priors(total: Array, near: Near, table: PriceTable, shares: Mapping[int, float]) -> None:
    decode_step_s = table.columns.decode_step_s
    for column in (*shares, *near.resident):
        total[column] = total.item(column) - PRIOR_STEPS * decode_step_s.item(column)
