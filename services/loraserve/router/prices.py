"""What can be priced of an engine before a request is known. Pure.

One row of numbers per engine, made anew when a report or what was sent there changes it; kept as columns, so that a
request is priced at all engines at once.
"""

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from loraserve.cost import LARGEST_SURPRISE, CostModel, StepShape
from loraserve.messages import EngineLoad
from loraserve.router.engine_view import EngineView

Array: TypeAlias = npt.NDArray[np.float64]
T = TypeVar("T", float, Array)

DEFAULT_STEP_TOKENS = 512
"""Of a step, where an engine does not say."""


class Prices(NamedTuple, Generic[T]):
    """Of one engine as floats, of all as arrays in the order of their columns.

    A step that carries prefill takes ``pace`` times (``step_s`` + rank * ``step_rank_s`` + its prefill tokens), where
    rank is the largest in it (0 with exact cost). ``harm_rank``: the largest that runs or waits there, or that the plan
    keeps there. A load of b bytes takes ``load_base_s`` + b * ``load_byte_s``, those before it counted.
    ``kv_wait_token_s``, ``kv_wait_s``: waiting for room in the KV cache for t tokens, where that is more than 0.
    """

    queue_s: T
    place_s: T
    kv_wait_token_s: T
    kv_wait_s: T
    steps_per_token: T
    pace: T
    step_s: T
    step_rank_s: T
    decode_step_s: T
    rank: T
    harm_rank: T
    sequences: T
    queue_tokens: T
    load_base_s: T
    load_byte_s: T
    room_bytes: T
    room_wait_s: T
    longest_tokens: T
    largest_extent_bytes: T
    avoided: T


def prices_of(engine: EngineView, cost: CostModel, output_tokens: float) -> Prices[float]:
    """``output_tokens``: mean of a request, which says when those that run will have ended."""
    load, mix, pending = engine.load, engine.mix, engine.pending.values()
    requests = engine.requests
    sequences = min(requests, load.max_running) if load.max_running > 0 else requests
    rank, rank_sum, slab_bytes = mix.largest_rank, mix.rank_sum, mix.slab_bytes
    counted = {""}
    for request in pending:
        rank, rank_sum = max(rank, request.rank), rank_sum + request.rank
        if request.version not in counted and request.version not in engine.active:
            counted.add(request.version)
            slab_bytes += request.slab_bytes
    kv_tokens = max(0, load.kv_blocks_total - load.kv_blocks_free) * load.block_tokens
    queue_tokens = max(0, load.waiting_prefill_tokens) + engine.pending_tokens
    # Who waits now decodes, with its context, in the steps that will carry this request's prefill.
    step_s = cost.step_s(
        StepShape(
            decode_sequences=sequences, kv_tokens=kv_tokens + queue_tokens, slab_bytes=slab_bytes, rank_tokens=rank_sum
        )
    )
    step_rank_s, token_s = 0.0, cost.prefill_token_s
    if cost.lora == "padded":
        step_rank_s = sequences * cost.padded_decode_s
        token_s += rank * cost.padded_prefill_s
    elif requests:
        token_s += rank_sum / requests * cost.rank_token_s
    whole_step_s = step_s + rank * step_rank_s
    chunk_tokens = max(1, (load.max_step_tokens or DEFAULT_STEP_TOKENS) - sequences)
    full_token_s = token_s + whole_step_s / chunk_tokens
    slowness = _slowness(load, engine, cost, kv_tokens)
    pace = _pace(load, full_token_s, slowness)
    request_s = output_tokens * whole_step_s * slowness
    queue_s = queue_tokens * (full_token_s + _mean_context(queue_tokens, requests) * cost.prefill_kv_token_s)
    if load.running > 0:
        # A request comes, on average, in the middle of a step.
        queue_s += whole_step_s / 2
    kv_wait_token_s, kv_wait_s = _kv_wait(load, queue_tokens, request_s)
    loads = 1 + len(engine.loading) / 2
    load_byte_s = 1 / load.load_bytes_per_s if _known(load.load_bytes_per_s) else cost.load_byte_s
    return Prices(
        queue_s=queue_s * pace,
        place_s=max(0, requests + 1 - load.max_running) / load.max_running * request_s if load.max_running > 0 else 0.0,
        kv_wait_token_s=kv_wait_token_s,
        kv_wait_s=kv_wait_s,
        steps_per_token=1 / chunk_tokens,
        pace=pace,
        step_s=step_s,
        step_rank_s=step_rank_s,
        decode_step_s=whole_step_s * slowness,
        rank=rank,
        harm_rank=max(rank, mix.planned_rank),
        sequences=sequences,
        queue_tokens=queue_tokens,
        load_base_s=cost.load_base_s * loads,
        load_byte_s=load_byte_s * loads,
        room_bytes=engine.room_bytes,
        room_wait_s=request_s,
        longest_tokens=load.max_model_tokens or np.inf,
        largest_extent_bytes=engine.largest_extent_bytes,
        avoided=engine.avoided_since_s is not None,
    )


def _known(measured: float) -> bool:
    """Zero is not measured; NaN and infinity are no measurements."""
    return 0 < measured < float("inf")


def _slowness(load: EngineLoad, engine: EngineView, cost: CostModel, kv_tokens: int) -> float:
    """How much longer this engine's decode steps take than the model says, at least 1.

    The measurement is of the last steps without prefill. Where such are rare it is of a time when fewer ran, and would
    make the busiest engine look like the fastest: being fast is not believed.
    """
    if load.running <= 0 or not _known(load.decode_step_s):
        return 1.0
    mix = engine.mix
    shape = StepShape(
        decode_sequences=load.running,
        kv_tokens=kv_tokens,
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


def _mean_context(queue_tokens: int, requests: int) -> float:
    """Of a token that waits for prefill: half of a mean prompt."""
    return queue_tokens / max(1, requests) / 2


def _kv_wait(load: EngineLoad, queue_tokens: int, request_s: float) -> tuple[float, float]:
    """Seconds per token of the prompt, and beside: until enough of the running requests have given back blocks."""
    used_blocks = load.kv_blocks_total - load.kv_blocks_free
    if used_blocks <= 0 or load.block_tokens <= 0:
        return 0.0, 0.0
    block_s = request_s / used_blocks
    return block_s / load.block_tokens, ((1 + queue_tokens) / load.block_tokens - load.kv_blocks_free) * block_s


class PriceTable:
    """The prices of the engines that take requests, up to date whenever they are asked for."""

    def __init__(self) -> None:
        self.engines: list[EngineView] = []
        self.columns: Prices[Array] = Prices(*np.zeros((len(Prices._fields), 0)))
        self.requests = 0.0
        """Mean of those at an engine."""
        self.least_longest_tokens = 0.0
        self.least_extent_bytes = 0.0
        self.suspects = 0
        """Engines that are avoided."""
        self._values = np.zeros((len(Prices._fields), 0))
        self._made_with: tuple[CostModel, float] | None = None
        self._changed: set[int] = set()

    def begin(self, engines: Sequence[EngineView]) -> None:
        """These take requests now, and reports have changed them all."""
        for engine in self.engines:
            engine.column = -1
        self.engines = list(engines)
        for column, engine in enumerate(self.engines):
            engine.column = column
        self._made_with = None

    def changed(self, engine: EngineView) -> None:
        """Something other than a report has changed it."""
        if engine.column >= 0:
            self._changed.add(engine.column)

    def refresh(self, cost: CostModel, output_tokens: float) -> None:
        made_with = self._made_with
        if made_with is None or made_with[0] is not cost or made_with[1] != output_tokens:
            rows = [prices_of(engine, cost, output_tokens) for engine in self.engines]
            self._values = np.array(rows, dtype=np.float64).reshape(-1, len(Prices._fields)).T.copy()
            self.columns = Prices(*self._values)
            self._made_with = cost, output_tokens
            self.least_longest_tokens = float(self.columns.longest_tokens.min(initial=np.inf))
            self.least_extent_bytes = float(self.columns.largest_extent_bytes.min(initial=np.inf))
            self._sum()
        elif self._changed:
            for column in self._changed:
                self._values[:, column] = prices_of(self.engines[column], cost, output_tokens)
            self._sum()
        self._changed.clear()

    def _sum(self) -> None:
        self.requests = float(self.columns.sequences.sum()) / max(1, len(self.engines))
        self.suspects = int(np.count_nonzero(self.columns.avoided))

    def validate(self) -> None:
        """What is kept is what would be made now; raises AssertionError naming the engine."""
        for column, engine in enumerate(self.engines):
            assert engine.column == column, f"{engine.name} is in another column"
        if self._made_with is None:
            return
        for column, engine in enumerate(self.engines):
            if column not in self._changed:
                fresh = np.array(prices_of(engine, *self._made_with), dtype=np.float64)
                assert np.array_equal(self._values[:, column], fresh), f"{engine.name}: its prices are out of date"
