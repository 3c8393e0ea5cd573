"""The scheduler's state as numbers for the monitor and the operator. Pure."""

from typing import TYPE_CHECKING

import msgspec

from loraserve.messages import AdapterTokens, PrefetchCounts, ResidentAdapter

if TYPE_CHECKING:
    from loraserve.engine.scheduler import Scheduler


IDLE_REPORTS = 40
"""An adapter that this many reports found unchanged is forgotten: so many may be lost, and no token is."""


class _Count(msgspec.Struct):
    """One adapter's. ``changed`` is the number of reports that were out when it last grew."""

    span: int
    prefill: int = 0
    decode: int = 0
    requests: int = 0
    changed: int = 0


class TokenCounts:
    """What was computed, by adapter version ("" is the base model), of those that were lately asked for.

    It is bounded by what is active: the versions an engine has ever served would be all there are.
    """

    def __init__(self) -> None:
        self._counts: dict[str, _Count] = {}
        self._spans = 0
        self._reports = 0
        self.preemptions = 0
        self.prefix_hits = 0
        self.prefix_queries = 0

    def request(self, version: str) -> None:
        self._of(version).requests += 1

    def computed(self, version: str, tokens: int, decode: bool) -> None:
        count = self._of(version)
        if decode:
            count.decode += tokens
        else:
            count.prefill += tokens

    def prefix(self, known: int, cached: int) -> None:
        """A sequence began with ``cached`` of its ``known`` tokens already computed."""
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

    def reported(self) -> None:
        """A report is out: what was idle for many of them is forgotten, and begins a new span when it comes again."""
        self._reports += 1
        oldest = self._reports - IDLE_REPORTS
        for version in [version for version, count in self._counts.items() if count.changed < oldest]:
            del self._counts[version]

    def _of(self, version: str) -> _Count:
        count = self._counts.get(version)
        if count is None:
            self._spans += 1
            count = self._counts[version] = _Count(self._spans)
        count.changed = self._reports
        return count


class SchedulerLoad(msgspec.Struct, frozen=True, kw_only=True):
    """Fields are those of EngineLoad that the scheduler knows."""

    waiting: int
    running: int
    waiting_prefill_tokens: int
    kv_blocks_total: int
    kv_blocks_free: int
    block_tokens: int
    pool_total_bytes: int
    pool_free_bytes: int
    pool_room_bytes: int
    max_running: int
    max_model_tokens: int
    max_step_tokens: int
    steps: int
    preemptions: int
    early_starts: int
    early_starts_in_vain: int
    prefix_hits_tokens: int
    prefix_queries_tokens: int
    resident: tuple[ResidentAdapter, ...]
    loading: tuple[str, ...]
    adapter_tokens: tuple[AdapterTokens, ...]
    request_ids: tuple[str, ...]
    plan_epoch: int
    prefetched: tuple[PrefetchCounts, ...]


def snapshot(scheduler: "Scheduler") -> SchedulerLoad:
    """The load right now."""
    live = scheduler.waiting + scheduler.running
    entries = list(scheduler.residency.pool.entries())
    return SchedulerLoad(
        waiting=len(scheduler.waiting),
        running=len(scheduler.running),
        waiting_prefill_tokens=sum(s.remaining for s in live if not s.decoding),
        kv_blocks_total=scheduler.limits.kv_blocks,
        kv_blocks_free=scheduler.blocks.free,
        block_tokens=scheduler.limits.block_tokens,
        pool_total_bytes=scheduler.limits.pool_bytes,
        pool_free_bytes=scheduler.residency.pool.free_bytes,
        pool_room_bytes=scheduler.residency.pool.room_bytes,
        max_running=scheduler.limits.max_running,
        max_model_tokens=scheduler.max_model_tokens,
        max_step_tokens=scheduler.limits.max_step_tokens,
        steps=scheduler.steps,
        preemptions=scheduler.counts.preemptions,
        early_starts=scheduler.early.begun,
        early_starts_in_vain=scheduler.early.in_vain,
        prefix_hits_tokens=scheduler.counts.prefix_hits,
        prefix_queries_tokens=scheduler.counts.prefix_queries,
        resident=tuple(
            ResidentAdapter(
                name=e.adapter.name,
                version=e.adapter.version,
                rank=e.adapter.rank,
                slab_bytes=e.adapter.slab_bytes,
                pinned=e.planned,
                running=e.running,
            )
            for e in entries
            if e.resident
        ),
        loading=tuple(e.adapter.version for e in entries if not e.resident),
        adapter_tokens=scheduler.counts.by_adapter(),
        request_ids=tuple(s.request_id for s in live),
        plan_epoch=scheduler.residency.plan_epoch,
        prefetched=scheduler.residency.prefetched(),
    )
