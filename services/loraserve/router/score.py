"""The score of a request at every engine, in seconds. The engine with the lowest score is the best.

score = predicted time to first token (TTFT)
      + engine_time_weight * engine time of the request until its end, including the delay of other requests
      + LOAD_WEIGHT * time to load the adapter
      - PRIOR_STEPS decode steps if the plan has a copy there, and again if the adapter is resident

All engines are scored at once, in numpy arrays with one column for each engine.
"""

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from loraserve.cost import CostModel, extent_bytes
from loraserve.messages import AdapterRef, Route
from loraserve.router.context import RoutingContext
from loraserve.router.engine_view import EngineView
from loraserve.router.prices import Array, PriceTable
from loraserve.router.view import ClusterView

LOAD_WEIGHT = 1.5
"""Seconds added to the score per second of loading, besides TTFT: a load takes pool space and bandwidth from others."""
_LOAD_WEIGHT, _ONE = np.array(LOAD_WEIGHT), np.array(1.0)
# Numbers become arrays here and below: for few engines, numpy combines two arrays in half the time of array and float.
PRIOR_STEPS = 0.5
"""Bonus for a planned and for a resident copy, in decode steps. It decides only between nearly equal engines."""


class AdapterColumns(msgspec.Struct, frozen=True, gc=False):
    """The engines (columns of the price table) where the adapter is resident, loading or used by other requests."""

    resident: list[int]
    loading: list[int]
    in_use: list[int]


class Scores(msgspec.Struct, frozen=True, gc=False):
    """The scores of a request by column, and the values from which they are computed.

    ``Prediction`` explains the times. ``shares`` are the traffic shares of planned copies. Later changes of the price
    table do not change the arrays and ``engines``.
    """

    score: Array
    ttft_s: Array
    queue_s: Array
    load_s: Array
    own_s: Array
    step_s: Array
    engine_s: Array
    cached_tokens: Mapping[int, int]
    adapter_columns: AdapterColumns
    request: Route
    shares: Mapping[int, float]
    engines: Sequence[EngineView]


def score(context: RoutingContext, table: PriceTable, shares: Mapping[int, float]) -> Scores:
    """Score the request at every ready engine, including engines whose context or pool is too small for it.

    ``shares`` are the traffic shares of planned copies, by column.
    """
    request, view, cost = context.request, context.view, context.cost
    prices, tokens = table.columns, len(request.prompt_tokens)
    columns, cached = adapter_columns(request, view), view.cached_tokens(request)
    # Copied, because the table changes when later requests are sent.
    queue_s = prices.queue_s.copy()
    if tokens > table.fitting_tokens:
        queue_s = queue_s + np.maximum(prices.kv_wait_token_s * tokens + prices.kv_wait_s, 0.0)
    prefill = prefill_tokens(request, table, cached)
    step_s, own_s = prefill_seconds(request, columns, table, cost, prefill)
    engine_s = engine_seconds(request, columns, table, cost, prefill)
    if request.adapter is None:
        load_s = np.zeros(len(table.engines))
        ttft_s = queue_s + own_s
    else:
        load_s = _load_seconds(request.adapter, columns, table)
        # The adapter loads while the request waits in the queue.
        ttft_s = np.maximum(queue_s, load_s) + own_s
    total = ttft_s + engine_s * prices.engine_time_weight + load_s * _LOAD_WEIGHT
    for column in (*shares, *columns.resident):
        total[column] = total.item(column) - PRIOR_STEPS * prices.decode_step_s.item(column)
    return Scores(
        total, ttft_s, queue_s, load_s, own_s, step_s, engine_s, cached, columns, request, shares, table.engines
    )


def adapter_columns(request: Route, view: ClusterView) -> AdapterColumns:
    """Return the columns of ready engines that hold, load or use the request's adapter."""
    columns = AdapterColumns([], [], [])
    if request.adapter is None:
        return columns
    version = request.adapter.version
    for engine in view.engines_with(version).values():
        if engine.column < 0:
            continue
        is_pending = version in engine.pending_adapters.versions
        if version in engine.resident:
            columns.resident.append(engine.column)
        elif is_pending or version in engine.loading or version in engine.expected:
            columns.loading.append(engine.column)
        if is_pending or version in engine.active:
            columns.in_use.append(engine.column)
    return columns


def prefill_seconds(
    request: Route, columns: AdapterColumns, table: PriceTable, cost: CostModel, tokens: Array
) -> tuple[Array, Array]:
    """Return by column the time of the steps that prefill ``tokens``: ``step_s`` without, ``own_s`` with these tokens.

    A step holds a limited number of tokens. Every running sequence of the engine also decodes in each of these steps.
    """
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
    for column in columns.in_use:
        slab_s[column] = 0.0
    step_s = (prices.step_s + slab_s) * steps
    return step_s, step_s + paced_tokens * np.array(token_s + adapter.rank * cost.rank_token_s)


def engine_seconds(request: Route, columns: AdapterColumns, table: PriceTable, cost: CostModel, tokens: Array) -> Array:
    """Return the engine time of the request until its end: its own work, and the delay of other requests.

    ``tokens`` is the number of prompt tokens that need prefill. With padded cost, each step is padded to its largest
    rank, so a higher rank slows the other requests. Their largest rank is taken to be ``Prices.usual_rank``, a mean
    over time. If it were the current largest rank, an engine with one large adapter would attract more requests of that
    rank and stay slow. With exact cost, each decode step reads the slab, unless another request uses the adapter.
    """
    engine_s: Array
    prices, adapter, prompt_tokens = table.columns, request.adapter, len(request.prompt_tokens)
    # The output length is unknown. The mean is the best estimate, limited by ``max_tokens``.
    max_tokens, mean_output_tokens = max(1, request.sampling.max_tokens), table.mean_output_tokens
    output_tokens = max_tokens if max_tokens < mean_output_tokens else mean_output_tokens
    token_s = cost.prefill_token_s + prompt_tokens / 2 * cost.prefill_kv_token_s
    decode_s = output_tokens * (cost.sequence_s + (prompt_tokens + output_tokens / 2) * cost.kv_token_s)
    if cost.lora == "padded":
        rank = np.maximum(prices.usual_rank, _rank(adapter))
        engine_s = (rank - prices.usual_rank) * prices.widening_s
        if output_tokens < mean_output_tokens:
            engine_s *= output_tokens / mean_output_tokens
        rank_s = tokens * np.array(cost.padded_prefill_s) + np.array(output_tokens * cost.padded_decode_s)
        engine_s = engine_s + rank * rank_s + (tokens * np.array(token_s) + np.array(decode_s))
        return engine_s
    if adapter is None:
        engine_s = table.ones * (tokens * np.array(token_s) + np.array(decode_s))
        return engine_s
    rank_token_s = adapter.rank * cost.rank_token_s
    engine_s = table.ones * np.array(adapter.slab_bytes * cost.slab_byte_s * output_tokens)
    for column in columns.in_use:
        engine_s[column] = 0.0
    engine_s += tokens * np.array(token_s + rank_token_s) + np.array(decode_s + output_tokens * rank_token_s)
    return engine_s


def prefill_tokens(request: Route, table: PriceTable, cached: Mapping[int, int]) -> Array:
    """Return how many prompt tokens need prefill: by column, or one number for all if no prefix is cached."""
    tokens = np.array(float(len(request.prompt_tokens)))
    if not cached:
        return tokens
    remaining = np.full(len(table.engines), tokens)
    for column, count in cached.items():
        remaining[column] -= count
    return remaining


def _rank(adapter: AdapterRef | None) -> Array:
    return np.array(float(adapter.rank) if adapter is not None else 0.0)


def _load_seconds(adapter: AdapterRef, columns: AdapterColumns, table: PriceTable) -> Array:
    """Return the time until the adapter is resident: earlier loads, its own load, and any wait for pool space."""
    prices = table.columns
    load_s: Array = prices.load_byte_s * np.array(float(adapter.slab_bytes)) + prices.load_base_s
    for column in columns.loading:
        # The load started at an unknown time: half of it remains on average. It already has its pool space.
        load_s[column] /= 2
    if adapter.slab_bytes > table.fitting_slab_bytes:
        wait_s = (prices.room_bytes < extent_bytes(adapter.slab_bytes)) * prices.room_wait_s
        wait_s[columns.loading] = 0.0
        load_s += wait_s
    for column in columns.resident:
        load_s[column] = 0.0
    return load_s
