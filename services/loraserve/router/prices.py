"""What can be priced of an engine before a request is known. Pure.

One row of numbers per engine, made anew when a report or what was sent there changes it; kept as columns, so that a
request is priced at all engines at once.
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
HARM_WEIGHT = 0.5
"""Seconds of a request's start that a second of an idle engine's time is worth: those who run there lose time between
tokens, and whoever comes next waits for a longer step."""
FULL_WEIGHT = 1.0
"""What it is worth beside that where the part f of an engine is full: this times f**2 / (1 - f), as queues grow.

Prefill goes before decode, so that nobody waits until places or KV memory are used up; what was wasted until then is
paid then."""
FULL = 0.98
"""Of its places or its KV memory, whichever is fuller, in use: from here on no engine counts as fuller."""


class Prices(msgspec.Struct, Generic[T], frozen=True, gc=False):
    """Of one engine as floats, of all as arrays in the order of their columns.

    A step that carries prefill takes ``step_s`` + rank * ``step_rank_s`` + ``pace`` * its prefill tokens' time, where
    rank is the largest in it (``step_rank_s`` is 0 with exact cost). ``queue_s``: until all that is there has been
    computed and there is a place in the batch; ``kv_wait_token_s``, ``kv_wait_s``: longer by this for t tokens, where
    it is more than 0, for room in the KV cache. ``rank``: the largest that runs or waits there; ``harm_rank``: that
    which is expected at a time (Mix.expected_rank), or the former where the plan keeps nothing. ``widening_s``: engine
    time that one more rank costs those there, over the life of a mean request; ``harm_weight``: what a second of its
    time is worth, by how full it is. A load of b bytes takes ``load_base_s`` + b * ``load_byte_s``, those before it
    counted.
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
    harm_rank: T
    widening_s: T
    harm_weight: T
    load_base_s: T
    load_byte_s: T
    room_bytes: T
    room_wait_s: T
    longest_tokens: T
    largest_extent_bytes: T
    avoided: T
    """0 where it is asked in its turn; see EngineView.reluctance."""


class Common(NamedTuple):
    """What the prices of all engines are made with. ``output_tokens``: mean of a request, which says when those that
    run will have ended; ``sequences``: mean of those at an engine, which it is taken to fill up to again."""

    cost: CostModel
    output_tokens: float
    sequences: float


def prices_of(engine: EngineView, common: Common, slowness: float) -> Prices[float]:
    """Of an engine as it is now; ``slowness`` as below."""
    load, cost = engine.load, common.cost
    sequences = sequences_at(engine)
    rank = max(engine.mix.largest_rank, engine.pending_mix.largest_rank)
    queue_tokens = max(0, load.waiting_prefill_tokens) + engine.pending_tokens
    step_s, token_s, step_rank_s, widening_s = _step(engine, common, sequences, rank, queue_tokens)
    whole_step_s = step_s + rank * step_rank_s
    chunk_tokens = max(1, load.max_step_tokens - sequences)
    full_token_s = token_s + whole_step_s / chunk_tokens
    pace = _pace(load, full_token_s, slowness)
    request_s = common.output_tokens * whole_step_s * slowness
    place_s = _place_wait_s(engine, request_s)
    kv_wait_token_s, kv_wait_s = _kv_wait(load, queue_tokens, request_s)
    # A request comes, on average, in the middle of a step.
    rest_s = whole_step_s / 2 if load.running > 0 else 0.0
    loads = 1 + len(engine.loading) / 2
    return Prices(
        queue_s=pace * (rest_s + queue_tokens * full_token_s) + place_s,
        kv_wait_token_s=kv_wait_token_s,
        kv_wait_s=kv_wait_s - place_s,
        steps_per_token=1 / chunk_tokens,
        pace=pace,
        step_s=step_s * pace,
        step_rank_s=step_rank_s * pace,
        decode_step_s=whole_step_s * slowness,
        rank=rank,
        harm_rank=rank if engine.mix.expected_rank is None else engine.mix.expected_rank,
        widening_s=widening_s,
        harm_weight=_harm_weight(load),
        load_base_s=cost.load_base_s * loads,
        load_byte_s=_load_byte_s(load, cost) * loads,
        room_bytes=engine.room_bytes,
        room_wait_s=request_s,
        longest_tokens=load.max_model_tokens or INFINITY,
        largest_extent_bytes=engine.largest_extent_bytes,
        avoided=engine.reluctance,
    )


def fitting_tokens(prices: Prices[float]) -> float:
    """Prompts up to this length do not wait for room in the KV cache."""
    return -prices.kv_wait_s / prices.kv_wait_token_s if prices.kv_wait_token_s > 0 else INFINITY


def sequences_at(engine: EngineView) -> int:
    """That decode in a step soon: whoever waits now decodes in the steps that will carry the next one's prefill."""
    most = engine.load.max_running
    return min(engine.requests, most) if most > 0 else engine.requests


def _step(
    engine: EngineView, common: Common, sequences: int, rank: int, queue_tokens: int
) -> tuple[float, float, float, float]:
    """Seconds of a step without prefill but for what padding to a rank takes; of each token of the queue; of each rank
    of padding in a step; of each rank more, to all who are there."""
    cost, requests = common.cost, engine.requests
    rank_sum = engine.mix.rank_sum + engine.pending_mix.rank_sum
    shape = StepShape(
        decode_sequences=sequences,
        kv_tokens=_kv_tokens(engine.load) + queue_tokens,
        slab_bytes=engine.mix.slab_bytes + engine.pending_mix.slab_bytes,
        rank_tokens=rank_sum,
    )
    # A token attends to half of its prompt on average.
    token_s = cost.prefill_token_s + queue_tokens / max(1, requests) / 2 * cost.prefill_kv_token_s
    if cost.lora == "padded":
        lived_s = common.output_tokens * max(sequences, common.sequences) * cost.padded_decode_s
        widening_s = lived_s + queue_tokens * cost.padded_prefill_s
        return (
            cost.step_s(shape),
            token_s + rank * cost.padded_prefill_s,
            sequences * cost.padded_decode_s,
            widening_s,
        )
    return cost.step_s(shape), token_s + rank_sum / max(1, requests) * cost.rank_token_s, 0.0, 0.0


def _place_wait_s(engine: EngineView, request_s: float) -> float:
    """Until enough of the running requests, which take ``request_s`` each, have ended."""
    most = engine.load.max_running
    excess = engine.requests + 1 - most
    return excess / most * request_s if most > 0 and excess > 0 else 0.0


def _harm_weight(load: EngineLoad) -> float:
    places = load.running / load.max_running if load.max_running > 0 else 0.0
    blocks = 1 - load.kv_blocks_free / load.kv_blocks_total if load.kv_blocks_total > 0 else 0.0
    full = min(max(places, blocks, 0.0), FULL)
    return HARM_WEIGHT + FULL_WEIGHT * full * full / (1 - full)


def _load_byte_s(load: EngineLoad, cost: CostModel) -> float:
    """As a mean load took there, without what every load takes beside its bytes."""
    if not (_known(load.load_bytes_per_s) and _known(load.load_bytes)):
        return cost.load_byte_s
    return max(1 / load.load_bytes_per_s - cost.load_base_s / load.load_bytes, 0.0)


def _known(measured: float) -> bool:
    """Zero is not measured; NaN and infinity are no measurements."""
    return 0 < measured < INFINITY


def slowness_of(engine: EngineView, cost: CostModel) -> float:
    """How much longer this engine's decode steps take than the model says, at least 1.

    The measurement is of the last steps without prefill. Where such are rare it is of a time when fewer ran, and would
    make the busiest engine look like the fastest: being fast is not believed.
    """
    load, mix = engine.load, engine.mix
    if load.running <= 0 or not _known(load.decode_step_s):
        return 1.0
    shape = StepShape(
        decode_sequences=load.running,
        kv_tokens=_kv_tokens(load),
        slab_bytes=mix.slab_bytes,
        rank_tokens=mix.rank_sum,
        max_rank=mix.running_rank,
    )
    return min(max(load.decode_step_s / cost.step_s(shape), 1.0), LARGEST_SURPRISE)


def _pace(load: EngineLoad, full_token_s: float, slowness: float) -> float:
    """The same of steps with prefill. Small chunks make a measured rate low whatever the engine can do: here it is
    being slow that is not believed, unless decode steps say the same."""
    if not _known(load.prefill_tokens_per_s):
        return slowness
    measured = 1 / load.prefill_tokens_per_s / full_token_s
    return min(max(measured, 1 / LARGEST_SURPRISE), slowness)


def _kv_tokens(load: EngineLoad) -> int:
    return max(0, load.kv_blocks_total - load.kv_blocks_free) * load.block_tokens


def _kv_wait(load: EngineLoad, queue_tokens: int, request_s: float) -> tuple[float, float]:
    """Seconds per token of the prompt, and beside: until enough of the running requests have given back blocks."""
    used_blocks = load.kv_blocks_total - load.kv_blocks_free
    if used_blocks <= 0 or load.block_tokens <= 0:
        return 0.0, 0.0
    block_s = request_s / used_blocks
    return block_s / load.block_tokens, ((1 + queue_tokens) / load.block_tokens - load.kv_blocks_free) * block_s


# MERGED: loraserve.router.prices
# """The prices of all engines as columns, so that a request is priced at all of them at once. Pure."""


FIELDS = len(Prices.__struct_fields__)
BEHIND_WEIGHT = 1.0
"""What a second of an engine's time is worth, beside its ``harm_weight``, for each request that comes before the queue
there is gone: it waits that second longer."""


class PriceTable:
    """The engines that take requests; their prices are up to date whenever ``refresh`` was called."""

    def __init__(self) -> None:
        self.engines: list[EngineView] = []
        self.columns: Prices[Array] = Prices(*np.zeros((FIELDS, 0)))
        self.least_longest_tokens = 0.0
        self.least_extent_bytes = 0.0
        self.fitting_tokens = self.fitting_slab_bytes = 0.0
        """Prompts up to this length wait for room in the KV cache nowhere, and adapters up to this size for room in the
        pool; perhaps larger ones do not either."""
        self.ones: Array = np.ones(0)
        self.output_tokens = 0.0
        """Mean of a request."""
        self.harm_weight: Array = np.zeros(0)
        """By column. Time that an engine loses delays all who arrive there while its queue lasts, and fills it sooner:
        nearly nobody where it is idle, and many near the limit, where only what a request costs decides how much can be
        served."""
        self.suspects: set[int] = set()
        """Columns of engines that are asked after all others."""
        self._values = np.zeros((FIELDS + 1, 0))
        self._slowness: list[float] = []
        self._common: Common | None = None
        self._requests_per_s = self._behind = 0.0
        self._changed: set[int] = set()

    def begin(self, engines: Sequence[EngineView]) -> None:
        """These take requests now, and reports have changed them all."""
        for engine in self.engines:
            engine.column = -1
        self.engines = list(engines)
        for column, engine in enumerate(self.engines):
            engine.column = column
        self._common = None

    def changed(self, engine: EngineView) -> None:
        """Requests were sent there or have ended, or it is trusted more or less."""
        if engine.column >= 0:
            self._changed.add(engine.column)

    def refresh(self, cost: CostModel, output_tokens: float, requests_per_s: float) -> None:
        """``output_tokens``: mean of a request. ``requests_per_s``: of all engines."""
        common = self._common
        if (
            common is None
            or common.cost is not cost
            or common.output_tokens != output_tokens
            or self._requests_per_s != requests_per_s
        ):
            self._make(cost, output_tokens, requests_per_s)
        elif self._changed:
            for column in self._changed:
                self._renew(column, common)
        self._changed.clear()

    def _make(self, cost: CostModel, output_tokens: float, requests_per_s: float) -> None:
        sequences = sum(sequences_at(engine) for engine in self.engines) / max(1, len(self.engines))
        common = self._common = Common(cost, output_tokens, sequences)
        self.output_tokens = output_tokens
        self._slowness = [slowness_of(engine, cost) for engine in self.engines]
        priced = zip(self.engines, self._slowness, strict=True)
        rows = [prices_of(engine, common, slowness) for engine, slowness in priced]
        self._requests_per_s = requests_per_s
        self._behind = BEHIND_WEIGHT * (requests_per_s / max(1, len(self.engines)))
        values = np.array([self._values_of(row) for row in rows], dtype=np.float64)
        self._values = values.reshape(-1, FIELDS + 1).T.copy()
        columns = self.columns = Prices(*self._values[:-1])
        self.harm_weight = self._values[-1]
        self.least_longest_tokens = float(columns.longest_tokens.min(initial=np.inf))
        self.least_extent_bytes = float(columns.largest_extent_bytes.min(initial=np.inf))
        self.fitting_slab_bytes = float(columns.room_bytes.min(initial=np.inf)) - MIN_EXTENT_BYTES
        self.fitting_tokens = min((fitting_tokens(row) for row in rows), default=0.0)
        self.ones = np.ones(len(self.engines))
        self.suspects = set(columns.avoided.nonzero()[0].tolist())

    def _values_of(self, prices: Prices[float]) -> tuple[float, ...]:
        """What is kept of an engine: its prices, and its ``harm_weight`` with those who arrive there."""
        return *astuple(prices), prices.queue_s * self._behind + prices.harm_weight

    def _renew(self, column: int, common: Common) -> None:
        prices = prices_of(self.engines[column], common, self._slowness[column])
        if prices.avoided:
            self.suspects.add(column)
        else:
            self.suspects.discard(column)
        fitting = fitting_tokens(prices)
        if fitting < self.fitting_tokens:
            self.fitting_tokens = fitting
        self._values[:, column] = self._values_of(prices)

    def validate(self) -> None:
        """What is kept is what would be made now; raises AssertionError naming the engine."""
        for column, engine in enumerate(self.engines):
            assert engine.column == column, f"{engine.name} is in another column"
        if self._common is None:
            return
        for column, engine in enumerate(self.engines):
            if column not in self._changed:
                fresh = prices_of(engine, self._common, slowness_of(engine, self._common.cost))
                kept = self._values[:, column].tolist()
                assert kept == list(self._values_of(fresh)), f"{engine.name}: its prices are out of date"
                assert self.fitting_tokens <= fitting_tokens(fresh), f"{engine.name}: its KV cache was overlooked"
                room_bytes = fresh.room_bytes - MIN_EXTENT_BYTES
                assert self.fitting_slab_bytes <= room_bytes, f"{engine.name}: its pool was overlooked"
        suspects = set(self.columns.avoided.nonzero()[0].tolist())
        assert self._changed or self.suspects == suspects, "suspects were overlooked"
