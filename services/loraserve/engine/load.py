"""The scheduler's state as numbers for the monitor and the operator. Pure."""

from typing import TYPE_CHECKING

import msgspec

from loraserve.messages import AdapterTokens, ResidentAdapter

if TYPE_CHECKING:
    from loraserve.engine.scheduler import Scheduler


class TokenCounts:
    """What was computed since the engine began, by adapter version ("" is the base model)."""

    def __init__(self) -> None:
        self._tokens: dict[str, list[int]] = {}
        self.preemptions = 0
        self.prefix_hits = 0
        self.prefix_queries = 0

    def request(self, version: str) -> None:
        self._of(version)[2] += 1

    def computed(self, version: str, tokens: int, decode: bool) -> None:
        self._of(version)[1 if decode else 0] += tokens

    def prefix(self, known: int, cached: int) -> None:
        """A sequence began with ``cached`` of its ``known`` tokens already computed."""
        self.prefix_queries += known
        self.prefix_hits += cached

    def by_adapter(self) -> tuple[AdapterTokens, ...]:
        return tuple(
            AdapterTokens(version=version, prefill_tokens=prefill, decode_tokens=decode, requests=requests)
            for version, (prefill, decode, requests) in self._tokens.items()
        )

    def _of(self, version: str) -> list[int]:
        return self._tokens.setdefault(version, [0, 0, 0])


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
    max_running: int
    max_model_tokens: int
    steps: int
    preemptions: int
    prefix_hits_tokens: int
    prefix_queries_tokens: int
    resident: tuple[ResidentAdapter, ...]
    loading: tuple[str, ...]
    adapter_tokens: tuple[AdapterTokens, ...]
    request_ids: tuple[str, ...]
    plan_epoch: int


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
        max_running=scheduler.limits.max_running,
        max_model_tokens=scheduler.max_model_tokens,
        steps=scheduler.steps,
        preemptions=scheduler.counts.preemptions,
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
    )
