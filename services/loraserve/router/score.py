"""What a request would see at each engine, and what those there would see of it: one score, in seconds. Pure.

score = predicted time to first token + HARM_WEIGHT * harm - what the plan and a copy that is there are worth.
"""

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import numpy as np

from loraserve.cost import CostModel, extent_bytes
from loraserve.messages import AdapterRef, Route
from loraserve.router.prices import Array, PriceTable
from loraserve.router.view import ClusterView

HARM_WEIGHT = 1.0
"""Seconds of this request's start that one second of an engine's time is worth, taken from others who go on there."""
LOAD_HARM = 0.5
"""Seconds of an engine's time that a second of loading costs it: room and bandwidth are taken from others."""
PRIOR_STEPS = 0.5
"""What a planned copy, and one that is there already, is worth in steps: enough to settle what is nearly a tie."""

Tokens: TypeAlias = float | Array


class Scores(NamedTuple):
    """Arrays in the order of the table's columns; ``own_s`` holds ``step_s``. ``saved_tokens`` by column."""

    score: Array
    ttft_s: Array
    queue_s: Array
    load_s: Array
    own_s: Array
    step_s: Array
    harm_s: Array
    saved_tokens: Mapping[int, int]


def score(request: Route, view: ClusterView, table: PriceTable, shares: Mapping[int, float], cost: CostModel) -> Scores:
    """At every ready engine, those that cannot serve it too. ``shares`` of the plan by column."""
    prices, tokens = table.columns, len(request.prompt_tokens)
    # What it will take of the engine is known no better than by the mean.
    output_tokens = min(view.output_tokens, max(1, request.sampling.max_tokens))
    saved = _saved_tokens(request, view)
    queue_s = prices.queue_s + np.maximum(prices.place_s, prices.kv_wait_token_s * tokens + prices.kv_wait_s)
    step_s, own_s = own_seconds(request, view, table, cost, _without(saved, tokens, len(table.engines)))
    harm_s = _harm_s(request, view, table, cost, output_tokens)
    if request.adapter is None:
        load_s = np.zeros(len(table.engines))
        ttft_s = queue_s + own_s
    else:
        load_s = _load_s(request.adapter, view, table)
        # It loads while it waits in the queue; neither makes the other longer.
        ttft_s = np.maximum(queue_s, load_s) + own_s
        harm_s = harm_s + load_s * LOAD_HARM
    total = ttft_s + harm_s * HARM_WEIGHT
    _subtract_priors(total, request, view, table, shares)
    return Scores(total, ttft_s, queue_s, load_s, own_s, step_s, harm_s, saved)


def own_seconds(
    request: Route, view: ClusterView, table: PriceTable, cost: CostModel, tokens: Tokens
) -> tuple[Array, Array]:
    """The steps that carry ``tokens`` of its prefill, without and with that prefill: a step holds no more than so many
    tokens, and whoever decodes there decodes in each of them."""
    prices, adapter = table.columns, request.adapter
    token_s = cost.prefill_token_s + len(request.prompt_tokens) / 2 * cost.prefill_kv_token_s
    steps = np.maximum(prices.steps_per_token * tokens, 1.0) * prices.pace
    if cost.lora == "padded":
        rank = np.maximum(prices.rank, adapter.rank if adapter is not None else 0)
        step_s = steps * (prices.step_s + rank * prices.step_rank_s)
        return step_s, step_s + prices.pace * ((rank * cost.padded_prefill_s + token_s) * tokens)
    if adapter is None:
        step_s = steps * prices.step_s
    else:
        token_s += adapter.rank * cost.rank_token_s
        slab_s = adapter.slab_bytes * cost.slab_byte_s
        step_s = steps * (prices.step_s + slab_s)
        for column in _running(adapter.version, view):
            step_s[column] -= steps[column] * slab_s
    return step_s, step_s + prices.pace * (tokens * token_s)


def _harm_s(request: Route, view: ClusterView, table: PriceTable, cost: CostModel, output_tokens: float) -> Array:
    """Engine time that the request costs because of who else is there, over all of its life.

    Padded: with a larger rank than the others' it widens them, with a smaller one it is widened itself. An engine is
    taken to fill up to the mean again, and to run what the plan keeps there: what it holds this very moment is gone
    before the request is. Exact: its slab is read in every step, unless it is read there anyway.
    """
    prices, adapter = table.columns, request.adapter
    if cost.lora == "padded":
        rank = adapter.rank if adapter is not None else 0
        widest = np.maximum(prices.harm_rank, rank)
        decode_s = output_tokens * cost.padded_decode_s
        others_s = np.maximum(prices.sequences, table.requests) * decode_s + prices.queue_tokens * cost.padded_prefill_s
        itself_s = decode_s + len(request.prompt_tokens) * cost.padded_prefill_s
        return (widest - prices.harm_rank) * others_s + (widest - rank) * itself_s
    if adapter is None:
        return np.zeros(len(table.engines))
    harm_s = np.full(len(table.engines), adapter.slab_bytes * cost.slab_byte_s * output_tokens)
    for column in _running(adapter.version, view):
        harm_s[column] = 0.0
    return harm_s


def _load_s(adapter: AdapterRef, view: ClusterView, table: PriceTable) -> Array:
    """Until an absent adapter is there: its load, after those on their way, and a wait where the pool is in use."""
    prices = table.columns
    alone_s = prices.load_byte_s * adapter.slab_bytes + prices.load_base_s
    load_s = alone_s + (prices.room_bytes < extent_bytes(adapter.slab_bytes)) * prices.room_wait_s
    for engine in view.near(adapter.version).values():
        if engine.column < 0:
            continue
        if adapter.version in engine.resident:
            load_s[engine.column] = 0.0
        elif engine.fetches(adapter.version):
            # It began some time ago.
            load_s[engine.column] = alone_s[engine.column] / 2
    return load_s


def _running(version: str, view: ClusterView) -> list[int]:
    return [e.column for e in view.near(version).values() if e.column >= 0 and e.runs(version)]


def _saved_tokens(request: Route, view: ClusterView) -> Mapping[int, int]:
    cached = view.cached_tokens(request)
    if not cached:
        return {}
    columns = ((view.engines[name].column, tokens) for name, tokens in cached.items() if name in view.engines)
    return {column: tokens for column, tokens in columns if column >= 0}


def _without(saved: Mapping[int, int], tokens: int, engines: int) -> Tokens:
    if not saved:
        return float(tokens)
    left = np.full(engines, float(tokens))
    for column, cached in saved.items():
        left[column] -= cached
    return left


def _subtract_priors(
    total: Array, request: Route, view: ClusterView, table: PriceTable, shares: Mapping[int, float]
) -> None:
    if request.adapter is None:
        return
    decode_step_s = table.columns.decode_step_s
    for column in shares:
        total[column] -= PRIOR_STEPS * decode_step_s[column]
    for engine in view.near(request.adapter.version).values():
        if engine.column >= 0 and request.adapter.version in engine.resident:
            total[engine.column] -= PRIOR_STEPS * decode_step_s[engine.column]
