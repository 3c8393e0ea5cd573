"""Prices of engines: the parts of a request's cost that do not depend on the request.

``prices_of`` computes one engine's prices. ``PriceTable`` keeps the prices of all ready engines as numpy columns, so
that all engines are scored at once. ``refresh`` recomputes an engine's prices after a report or a sent request.
"""

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeAlias, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec.structs import astuple

from loraserve.cost import LARGEST_SURPRISE, MIN_EXTENT_BYTES, CostModel, StepShape
from loraserve.messages import EngineLoad
from loraserve.router.engine_view import EngineView

Array: TypeAlias = npt.NDArray[np.float64]
T = TypeVar("T", float, Array)

INFINITY = float("inf")
ENGINE_TIME_WEIGHT = 0.5
"""Seconds added to the score per second of an idle engine's time. Engine time delays the tokens of running requests and
the first token of the next request."""
FULLNESS_WEIGHT = 1.0
"""The weight of engine time grows by this times f**2 / (1 - f), like a queue. The engine's fullness f is from 0 to 1.

Prefill runs before decode, so requests wait only when batch places or KV memory are used up. Wasted engine time
delays requests only then."""
MAX_FULLNESS = 0.98
"""Upper bound of an engine's fullness f, which keeps 1 / (1 - f) finite."""
FOLLOWER_WEIGHT = 1.0
"""Seconds added to the score per second of engine time, for each request that arrives before the queue is empty: that
request waits a second longer."""


class Prices(msgspec.Struct, Generic[T], frozen=True, gc=False):
    """Prices of one engine as floats, or of all engines as arrays by column.

    A step with prefill takes ``step_s`` + r * ``step_rank_s`` + ``pace`` * time of its prefill tokens, where r is the
    largest rank in the step. A request with t prompt tokens waits ``queue_s`` + max(0, t * ``kv_wait_token_s`` +
    ``kv_wait_s``). A load of b bytes takes ``load_base_s`` + b * ``load_byte_s``.

    Attributes:
        queue_s: Time to compute all queued prefill, plus the wait for a place in the batch.
        kv_wait_s: The part of the wait for KV memory that does not depend on t; negative if memory is free.
        steps_per_token: 1 / number of prefill tokens that fit into a step besides decode tokens.
        pace: Factor by which prefill takes longer than the cost model predicts.
        step_s: Time of a step without prefill and without padding to a rank.
        step_rank_s: Time that each unit of the largest rank adds to a step; 0 with exact cost.
        rank: The largest rank among running and waiting requests.
        usual_rank: The mean largest rank (``AdapterMix.expected_rank``), or ``rank`` if the plan has no copy there.
        widening_s: Delay of other requests by a request of mean length, per unit by which it raises the largest rank.
        engine_time_weight: Seconds added to the score per second of engine time. It includes the delay of requests that
            arrive while the engine has a queue. It is high for full engines, because their throughput depends only on
            the engine time of each request.
        load_base_s: Fixed time of a load. Like ``load_byte_s``, it includes the wait for earlier loads.
        room_bytes: The largest extent that the pool can provide now.
        room_wait_s: Wait for an extent larger than ``room_bytes``.
        context_tokens: The longest context that the engine serves.
        largest_extent_bytes: The largest extent that the pool can ever provide.
    """

    queue_s: T
    kv_wait_token_s: T
    kv_wait_s: T
    steps_per_token: T
    pace: T
    step_s: T
    step_rank_s: T
    decode_step_s: T
    rank: T
    usual_rank: T
    widening_s: T
    engine_time_weight: T
    load_base_s: T
    load_byte_s: T
    room_bytes: T
    room_wait_s: T
    context_tokens: T
    largest_extent_bytes: T
    fallback_level: T


FIELDS = len(Prices.__struct_fields__)


class PriceInputs(NamedTuple):
    """Inputs that the prices of all engines share.

    ``mean_output_tokens`` predicts when running requests end. ``requests_per_s`` is the arrival rate of the whole
    cluster, and ``engine_requests_per_s`` that of one engine on average. ``mean_sequences`` is the mean number of
    sequences on an engine. Engines with fewer sequences are assumed to reach this number again.
    """

    cost: CostModel
    mean_output_tokens: float
    requests_per_s: float
    engine_requests_per_s: float
    mean_sequences: float


class PriceTable:
    """The ready engines and their prices, by column. Prices are up to date after ``refresh``.

    Attributes:
        min_context_tokens: Requests with a shorter prompt fit the context of every engine.
        min_extent_bytes: Slabs up to this size fit every pool.
        fitting_tokens: Prompts up to this length wait for KV memory on no engine; longer prompts may wait.
        fitting_slab_bytes: Slabs up to this size wait for pool space on no engine; larger slabs may wait.
        fallbacks: The columns of fallback engines.
    """

    def __init__(self) -> None:
        self.engines: list[EngineView] = []
        self.columns: Prices[Array] = Prices(*np.zeros((FIELDS, 0)))
        self.mean_output_tokens = 0.0
        self.min_context_tokens = self.min_extent_bytes = 0.0
        self.fitting_tokens = self.fitting_slab_bytes = 0.0
        self.fallbacks: set[int] = set()
        self.ones: Array = np.ones(0)
        self._values = np.zeros((FIELDS, 0))
        self._slowness: list[float] = []
        self._inputs: PriceInputs | None = None
        self._changed: set[int] = set()

    def set_engines(self, engines: Sequence[EngineView]) -> None:
        """Replace the engines. The next ``refresh`` recomputes all prices."""
        for engine in self.engines:
            engine.column = -1
        self.engines = list(engines)
        for column, engine in enumerate(self.engines):
            engine.column = column
        self._inputs = None

    def mark_changed(self, engine: EngineView) -> None:
        """Mark the engine's prices as outdated after a change of its pending requests or ``fallback_level``."""
        if engine.column >= 0:
            self._changed.add(engine.column)

    def refresh(self, cost: CostModel, mean_output_tokens: float, requests_per_s: float) -> None:
        """Recompute outdated prices. ``PriceInputs`` explains the arguments."""
        inputs = self._inputs
        if (
            inputs is None
            or inputs.cost is not cost
            or inputs.mean_output_tokens != mean_output_tokens
            or inputs.requests_per_s != requests_per_s
        ):
            self._compute_all(cost, mean_output_tokens, requests_per_s)
        else:
            for column in self._changed:
                self._renew(column, inputs)
        self._changed.clear()

    def _compute_all(self, cost: CostModel, mean_output_tokens: float, requests_per_s: float) -> None:
        count = max(1, len(self.engines))
        mean_sequences = sum(sequences_at(engine) for engine in self.engines) / count
        inputs = PriceInputs(cost, mean_output_tokens, requests_per_s, requests_per_s / count, mean_sequences)
        self._inputs = inputs
        self.mean_output_tokens = mean_output_tokens
        self._slowness = [slowness_of(engine, cost) for engine in self.engines]
        priced = zip(self.engines, self._slowness, strict=True)
        rows = [prices_of(engine, inputs, slowness) for engine, slowness in priced]
        values = np.array([astuple(row) for row in rows], dtype=np.float64)
        self._values = values.reshape(-1, FIELDS).T.copy()
        columns = self.columns = Prices(*self._values)
        self.min_context_tokens = float(columns.context_tokens.min(initial=np.inf))
        self.min_extent_bytes = float(columns.largest_extent_bytes.min(initial=np.inf))
        self.fitting_slab_bytes = float(columns.room_bytes.min(initial=np.inf)) - MIN_EXTENT_BYTES
        self.fitting_tokens = min((fitting_tokens(row) for row in rows), default=0.0)
        self.ones = np.ones(len(self.engines))
        self.fallbacks = set(columns.fallback_level.nonzero()[0].tolist())

    def _renew(self, column: int, inputs: PriceInputs) -> None:
        prices = prices_of(self.engines[column], inputs, self._slowness[column])
        if prices.fallback_level:
            self.fallbacks.add(column)
        else:
            self.fallbacks.discard(column)
        self.fitting_tokens = min(self.fitting_tokens, fitting_tokens(prices))
        self._values[:, column] = astuple(prices)

    def validate(self) -> None:
        """Raise AssertionError if the table differs from newly computed prices."""
        for column, engine in enumerate(self.engines):
            assert engine.column == column, f"{engine.name} is in another column"
        if self._inputs is None:
            return
        for column, engine in enumerate(self.engines):
            if column not in self._changed:
                fresh = prices_of(engine, self._inputs, slowness_of(engine, self._inputs.cost))
                row = self._values[:, column].tolist()
                assert row == list(astuple(fresh)), f"{engine.name}: its prices are out of date"
                assert self.fitting_tokens <= fitting_tokens(fresh), f"{engine.name}: its KV cache was overlooked"
                room_bytes = fresh.room_bytes - MIN_EXTENT_BYTES
                assert self.fitting_slab_bytes <= room_bytes, f"{engine.name}: its pool was overlooked"
        fallbacks = set(self.columns.fallback_level.nonzero()[0].tolist())
        assert self._changed or self.fallbacks == fallbacks, "fallback engines were overlooked"


def prices_of(engine: EngineView, inputs: PriceInputs, slowness: float) -> Prices[float]:
    """Return the prices of an engine in its current state; ``slowness`` is the result of ``slowness_of``."""
    load, limits, cost = engine.load, engine.capabilities, inputs.cost
    sequences = sequences_at(engine)
    rank = max(engine.adapters.largest_rank, engine.pending_adapters.largest_rank)
    queue_tokens = max(0, load.queue.waiting_prefill_tokens) + engine.pending_tokens
    step = _step_prices(engine, inputs, sequences, rank, queue_tokens)
    whole_step_s = step.step_s + rank * step.step_rank_s
    chunk_tokens = max(1, limits.max_step_tokens - sequences)
    full_token_s = step.token_s + whole_step_s / chunk_tokens
    pace = _pace(load, full_token_s, slowness)
    request_s = inputs.mean_output_tokens * whole_step_s * slowness
    place_s = _place_wait_s(engine, request_s)
    kv_wait_token_s, kv_wait_s = _kv_wait(engine, queue_tokens, request_s)
    # A request arrives, on average, in the middle of a step.
    rest_s = whole_step_s / 2 if load.queue.running > 0 else 0.0
    queue_s = pace * (rest_s + queue_tokens * full_token_s) + place_s
    followers_weight = queue_s * (FOLLOWER_WEIGHT * inputs.engine_requests_per_s)
    loads = 1 + len(engine.loading) / 2
    return Prices(
        queue_s=queue_s,
        kv_wait_token_s=kv_wait_token_s,
        kv_wait_s=kv_wait_s - place_s,
        steps_per_token=1 / chunk_tokens,
        pace=pace,
        step_s=step.step_s * pace,
        step_rank_s=step.step_rank_s * pace,
        decode_step_s=whole_step_s * slowness,
        rank=rank,
        usual_rank=rank if engine.adapters.expected_rank is None else engine.adapters.expected_rank,
        widening_s=step.widening_s,
        engine_time_weight=followers_weight + _engine_time_weight(engine),
        load_base_s=cost.load_base_s * loads,
        load_byte_s=_load_byte_s(load, cost) * loads,
        room_bytes=engine.room_bytes,
        room_wait_s=request_s,
        context_tokens=limits.max_model_tokens or INFINITY,
        largest_extent_bytes=engine.largest_extent_bytes,
        fallback_level=engine.fallback_level,
    )


def fitting_tokens(prices: Prices[float]) -> float:
    """Return the length of the longest prompt that does not wait for KV memory."""
    return -prices.kv_wait_s / prices.kv_wait_token_s if prices.kv_wait_token_s > 0 else INFINITY


def sequences_at(engine: EngineView) -> int:
    """Return how many sequences the engine will decode while it computes the next request's prefill.

    Waiting and pending requests are included, because they start before the next request.
    """
    max_running = engine.capabilities.max_running
    return min(engine.requests, max_running) if max_running > 0 else engine.requests


def slowness_of(engine: EngineView, cost: CostModel) -> float:
    """Return the factor (1 or more) by which the engine's decode steps take longer than the cost model predicts.

    The engine measures steps without prefill. A busy engine rarely has such steps, so its last measurement may be from
    a time with fewer requests. The engine would then look too fast, so a factor below 1 is replaced by 1.
    """
    load, adapters = engine.load, engine.adapters
    if load.queue.running <= 0 or not _is_measured(load.speed.decode_step_s):
        return 1.0
    shape = StepShape(
        decode_sequences=load.queue.running,
        kv_tokens=_kv_tokens(engine),
        slab_bytes=adapters.slab_bytes,
        rank_tokens=adapters.rank_sum,
        max_rank=adapters.running_rank,
    )
    return min(max(load.speed.decode_step_s / cost.step_s(shape), 1.0), LARGEST_SURPRISE)


class _StepPrices(NamedTuple):
    """Inputs of ``Prices`` from the cost model; ``token_s`` is the time of each queued prefill token."""

    step_s: float
    token_s: float
    step_rank_s: float
    widening_s: float


def _step_prices(engine: EngineView, inputs: PriceInputs, sequences: int, rank: int, queue_tokens: int) -> _StepPrices:
    cost, requests = inputs.cost, engine.requests
    rank_sum = engine.adapters.rank_sum + engine.pending_adapters.rank_sum
    shape = StepShape(
        decode_sequences=sequences,
        kv_tokens=_kv_tokens(engine) + queue_tokens,
        slab_bytes=engine.adapters.slab_bytes + engine.pending_adapters.slab_bytes,
        rank_tokens=rank_sum,
    )
    # A token attends to half of its prompt on average.
    token_s = cost.prefill_token_s + queue_tokens / max(1, requests) / 2 * cost.prefill_kv_token_s
    if cost.lora == "padded":
        decoded_s = inputs.mean_output_tokens * max(sequences, inputs.mean_sequences) * cost.padded_decode_s
        return _StepPrices(
            step_s=cost.step_s(shape),
            token_s=token_s + rank * cost.padded_prefill_s,
            step_rank_s=sequences * cost.padded_decode_s,
            widening_s=decoded_s + queue_tokens * cost.padded_prefill_s,
        )
    return _StepPrices(cost.step_s(shape), token_s + rank_sum / max(1, requests) * cost.rank_token_s, 0.0, 0.0)


def _place_wait_s(engine: EngineView, request_s: float) -> float:
    """Return the wait in seconds for a place in the batch, if each running request takes ``request_s``."""
    max_running = engine.capabilities.max_running
    excess = engine.requests + 1 - max_running
    return excess / max_running * request_s if max_running > 0 and excess > 0 else 0.0


def _engine_time_weight(engine: EngineView) -> float:
    """Return the part of ``Prices.engine_time_weight`` that grows as places in the batch or KV blocks are used up."""
    load, limits = engine.load, engine.capabilities
    places = load.queue.running / limits.max_running if limits.max_running > 0 else 0.0
    blocks = 1 - load.memory.kv_blocks_free / limits.kv_blocks if limits.kv_blocks > 0 else 0.0
    fullness = min(max(places, blocks, 0.0), MAX_FULLNESS)
    return ENGINE_TIME_WEIGHT + FULLNESS_WEIGHT * fullness * fullness / (1 - fullness)


def _load_byte_s(load: EngineLoad, cost: CostModel) -> float:
    """Return the seconds of loading per byte, without the fixed time of a load: measured, or else predicted."""
    mean = load.speed.load
    if mean is None or not (_is_measured(mean.bytes_per_s) and _is_measured(mean.slab_bytes)):
        return cost.load_byte_s
    return max(1 / mean.bytes_per_s - cost.load_base_s / mean.slab_bytes, 0.0)


def _is_measured(value: float) -> bool:
    """Return whether a reported value was measured, that is, positive and finite."""
    return 0 < value < INFINITY


def _pace(load: EngineLoad, full_token_s: float, slowness: float) -> float:
    """Return the factor by which steps with prefill take longer than the cost model predicts.

    Small chunks lower the measured prefill rate even on a fast engine. The factor is therefore at most ``slowness``
    (result of ``slowness_of``), which is measured in decode steps.
    """
    if not _is_measured(load.speed.prefill_tokens_per_s):
        return slowness
    measured = 1 / load.speed.prefill_tokens_per_s / full_token_s
    return min(max(measured, 1 / LARGEST_SURPRISE), slowness)


def _kv_tokens(engine: EngineView) -> int:
    limits = engine.capabilities
    return max(0, limits.kv_blocks - engine.load.memory.kv_blocks_free) * limits.block_tokens


def _kv_wait(engine: EngineView, queue_tokens: int, request_s: float) -> tuple[float, float]:
    """Return ``kv_wait_token_s`` and ``kv_wait_s`` of ``Prices``, which give the wait for KV memory.

    A request waits until enough running requests have ended and freed their blocks.
    """
    limits, free_blocks = engine.capabilities, engine.load.memory.kv_blocks_free
    used_blocks = limits.kv_blocks - free_blocks
    if used_blocks <= 0 or limits.block_tokens <= 0:
        return 0.0, 0.0
    block_s = request_s / used_blocks
    return block_s / limits.block_tokens, ((1 + queue_tokens) / limits.block_tokens - free_blocks) * block_s
