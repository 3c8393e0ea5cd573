"""Builds the engine's reports: load, counters, capabilities and measured speed."""

from collections.abc import Mapping
from math import inf
from typing import TYPE_CHECKING

import msgspec

from loraserve.adapter.format import SlabHeader
from loraserve.cost import StepShape, mean_step
from loraserve.engine.schedule.events import StepBatch
from loraserve.messages import (
    AdapterRef,
    AdapterState,
    AdapterTokens,
    EngineCapabilities,
    EngineCounters,
    MeanLoad,
    MeanStep,
    MeasuredSpeed,
    MemoryLoad,
    QueueLoad,
    ResidentAdapter,
)

if TYPE_CHECKING:
    from loraserve.engine.schedule.scheduler import Scheduler


IDLE_REPORTS = 10
"""Number of reports after which an unchanged adapter is dropped. If fewer reports are lost, no counts are lost."""


class _AdapterCount(msgspec.Struct):
    """The counts of one adapter. ``changed`` is the number of reports sent before the counts last changed."""

    span: int
    prefill: int = 0
    decode: int = 0
    requests: int = 0
    changed: int = 0


class TokenCounts:
    """Counts requests and computed tokens by adapter version. The version "" is the base model.

    Counts that did not change for IDLE_REPORTS reports are dropped, to bound memory. If the adapter is requested again,
    its counts start from zero with a new ``span`` number.
    """

    def __init__(self) -> None:
        self._counts: dict[str, _AdapterCount] = {}
        self._spans = 0
        self._reports = 0
        self.preemptions = 0
        self.prefix_hits = 0
        self.prefix_queries = 0

    def count_request(self, version: str) -> None:
        self._of(version).requests += 1

    def count_tokens(self, version: str, tokens: int, decode: bool) -> None:
        count = self._of(version)
        if decode:
            count.decode += tokens
        else:
            count.prefill += tokens

    def count_prefix(self, known: int, cached: int) -> None:
        """Count the tokens of a started sequence: ``known`` in total, ``cached`` found in the prefix cache."""
        self.prefix_queries += known
        self.prefix_hits += cached

    def by_adapter(self) -> tuple[AdapterTokens, ...]:
        return tuple(
            AdapterTokens(
                version=version,
                prefill_tokens=count.prefill,
                decode_tokens=count.decode,
                requests=count.requests,
                span=count.span,
            )
            for version, count in self._counts.items()
        )

    def mark_reported(self) -> None:
        """Count a sent report, and drop adapters whose counts did not change for IDLE_REPORTS reports."""
        self._reports += 1
        oldest = self._reports - IDLE_REPORTS
        for version in [version for version, count in self._counts.items() if count.changed < oldest]:
            del self._counts[version]

    def _of(self, version: str) -> _AdapterCount:
        count = self._counts.get(version)
        if count is None:
            self._spans += 1
            count = self._counts[version] = _AdapterCount(self._spans)
        count.changed = self._reports
        return count


class SchedulerLoad(msgspec.Struct, frozen=True, kw_only=True):
    queue: QueueLoad
    memory: MemoryLoad
    adapters: AdapterState


def snapshot(scheduler: "Scheduler") -> SchedulerLoad:
    live = scheduler.waiting + scheduler.running
    pool = scheduler.residency.pool
    return SchedulerLoad(
        queue=QueueLoad(
            waiting=len(scheduler.waiting),
            running=len(scheduler.running),
            waiting_prefill_tokens=sum(s.uncomputed for s in live if not s.is_decoding),
            request_ids=tuple(s.request_id for s in live),
        ),
        memory=MemoryLoad(
            kv_blocks_free=scheduler.blocks.free,
            pool_free_bytes=pool.eviction.free_bytes,
            pool_room_bytes=pool.eviction.room_bytes,
        ),
        adapters=AdapterState(
            resident=tuple(
                ResidentAdapter(
                    name=e.adapter.name,
                    version=e.adapter.version,
                    rank=e.adapter.rank,
                    slab_bytes=e.adapter.slab_bytes,
                    pinned=e.planned,
                    running=e.running,
                )
                for e in pool.entries()
                if e.is_complete
            ),
            loading=tuple(e.adapter.version for e in pool.entries() if e.is_loading),
            plan_epoch=scheduler.residency.plan_epoch,
        ),
    )


def count_events(scheduler: "Scheduler") -> EngineCounters:
    return EngineCounters(
        steps=scheduler.steps,
        preemptions=scheduler.counts.preemptions,
        prefix_hits_tokens=scheduler.counts.prefix_hits,
        prefix_queries_tokens=scheduler.counts.prefix_queries,
        early_starts=scheduler.early.started,
        early_starts_in_vain=scheduler.early.discarded,
        prefetched=scheduler.residency.prefetch_counts(),
    )


def describe_capabilities(scheduler: "Scheduler", engine: str, incarnation: str) -> EngineCapabilities:
    """Return the engine's capabilities, without the transports that peers can read over."""
    limits = scheduler.limits
    return EngineCapabilities(
        engine=engine,
        incarnation=incarnation,
        kv_blocks=limits.kv_blocks,
        block_tokens=limits.block_tokens,
        pool_bytes=limits.pool_bytes,
        max_running=limits.max_running,
        max_model_tokens=scheduler.max_model_tokens,
        max_step_tokens=limits.max_step_tokens,
    )


SMOOTHING = 0.1
"""Weight of the newest observation. The mean follows about the last ten steps."""


class SpeedMeter:
    """Measures the engine's steps and loads as exponential moving averages.

    Amounts (tokens, bytes) and seconds are averaged separately, because a mean of rates overweights short steps.
    """

    def __init__(self) -> None:
        self._decode_step: MeanStep | None = None
        self._prefill_step: MeanStep | None = None
        self._load_bytes = 0.0
        self._load_s = 0.0
        self._decode_steps = 0
        self._prefill_steps = 0
        self._loads = 0

    def measured(self) -> MeasuredSpeed:
        load = None
        if self._loads:
            load = MeanLoad(slab_bytes=self._load_bytes, bytes_per_s=self._load_bytes / self._load_s)
        return MeasuredSpeed(
            decode_step=self._decode_step,
            decode_steps=self._decode_steps,
            prefill_step=self._prefill_step,
            prefill_steps=self._prefill_steps,
            load=load,
            loads=self._loads,
        )

    def record_step(self, shape: StepShape, duration_s: float, times: int = 1) -> None:
        """Record ``times`` equal steps. A step with prefill tokens is recorded as a prefill step."""
        if not 0 < duration_s < inf:
            return
        if shape.prefill_tokens:
            self._prefill_steps += times
            self._prefill_step = _smooth(self._prefill_step, mean_step(shape, duration_s), times)
        else:
            self._decode_steps += times
            self._decode_step = _smooth(self._decode_step, mean_step(shape, duration_s), times)

    def record_load(self, slab_bytes: int, own_s: float) -> None:
        """Record a completed load. ``own_s`` estimates the seconds it would have taken without concurrent loads."""
        if not 0 < own_s < inf:
            return
        first = not self._loads
        self._loads += 1
        self._load_bytes = float(slab_bytes) if first else _move_towards(self._load_bytes, slab_bytes)
        self._load_s = own_s if first else _move_towards(self._load_s, own_s)


def _smooth(old: MeanStep | None, new: MeanStep, times: int) -> MeanStep:
    if old is None:
        return new
    fields = MeanStep.__struct_fields__
    return MeanStep(**{name: _move_towards(getattr(old, name), getattr(new, name), times) for name in fields})


def _move_towards(old: float, new: float, times: int = 1) -> float:
    return new + (1 - SMOOTHING) ** times * (old - new)


def step_shape(batch: StepBatch, adapters: Mapping[int, AdapterRef | SlabHeader]) -> tuple[StepShape, dict[int, int]]:
    """Return a step's shape for the cost model, and its number of tokens by adapter rank (0 for the base model)."""
    decode = kv = prefill = prefill_kv = 0
    slot_tokens: dict[int, int] = {}
    for part in batch.sequences:
        tokens = len(part.tokens)
        slot_tokens[part.slot] = slot_tokens.get(part.slot, 0) + tokens
        if tokens == 1 and part.output_index > 0:
            decode += 1
            kv += part.start + 1
        else:
            prefill += tokens
            prefill_kv += tokens * part.start + tokens * (tokens + 1) // 2
    mix: dict[int, int] = {}
    for slot, tokens in slot_tokens.items():
        rank = adapters[slot].rank if slot >= 0 else 0
        mix[rank] = mix.get(rank, 0) + tokens
    shape = StepShape(
        decode_sequences=decode,
        kv_tokens=kv,
        prefill_tokens=prefill,
        prefill_kv_tokens=prefill_kv,
        slab_bytes=sum(adapters[slot].slab_bytes for slot in slot_tokens if slot >= 0),
        rank_tokens=sum(rank * tokens for rank, tokens in mix.items()),
        max_rank=max(mix, default=0),
    )
    return shape, mix
