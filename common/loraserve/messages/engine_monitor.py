"""Engine -> monitor: load, statistics, capabilities. Monitor -> engines: holders of an adapter, dead engines."""

import msgspec

from loraserve.messages.base import Message
from loraserve.messages.transfer import Abilities


class QueueLoad(msgspec.Struct, frozen=True, kw_only=True):
    """The running and waiting requests of an engine. ``request_ids`` lists both.

    ``waiting_prefill_tokens`` counts the tokens that waiting, preempted and prefilling requests must still compute.
    """

    waiting: int = 0
    running: int = 0
    waiting_prefill_tokens: int = 0
    request_ids: tuple[str, ...] = ()


class MemoryLoad(msgspec.Struct, frozen=True, kw_only=True):
    """Free memory of an engine. ``pool_room_bytes`` is the largest slab that fits after evicting idle adapters."""

    kv_blocks_free: int
    pool_free_bytes: int
    pool_room_bytes: int


class MeanStep(msgspec.Struct, frozen=True, kw_only=True):
    """Smoothed means of the contents and durations of recent steps of one kind.

    All fields use the same smoothing weights, so predictions for the mean contents can be compared with
    ``duration_s``. StepShape defines the other fields. ``padded_prefill_tokens`` and ``padded_decode_tokens`` are the
    step's prefill and decode tokens times the largest rank in the step.
    """

    duration_s: float
    decode_sequences: float = 0.0
    kv_tokens: float = 0.0
    prefill_tokens: float = 0.0
    prefill_kv_tokens: float = 0.0
    slab_bytes: float = 0.0
    rank_tokens: float = 0.0
    padded_prefill_tokens: float = 0.0
    padded_decode_tokens: float = 0.0


class MeanLoad(msgspec.Struct, frozen=True, kw_only=True):
    """Smoothed means of recent adapter loads. An average load takes ``slab_bytes / bytes_per_s`` seconds.

    This time excludes waiting for other loads on the link.
    """

    slab_bytes: float
    bytes_per_s: float


class MeasuredSpeed(msgspec.Struct, frozen=True, kw_only=True):
    """The speeds that an engine measured. A mean is None before the first measurement.

    ``decode_step`` is the mean of steps without prefill. ``prefill_step`` is the mean of steps with prefill, with or
    without decoding sequences. ``decode_steps``, ``prefill_steps`` and ``loads`` count the measurements of this
    incarnation. If a count has grown since the last report, its mean includes new measurements.
    """

    decode_step: MeanStep | None = None
    decode_steps: int = 0
    prefill_step: MeanStep | None = None
    prefill_steps: int = 0
    load: MeanLoad | None = None
    loads: int = 0

    @property
    def decode_step_s(self) -> float:
        """Return the mean seconds of a step without prefill, or 0 before the first such step."""
        return self.decode_step.duration_s if self.decode_step else 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        """Return the prefill tokens per second in steps with prefill, or 0 before the first such step."""
        step = self.prefill_step
        return step.prefill_tokens / step.duration_s if step and step.duration_s else 0.0


class ResidentAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter in an engine's pool. If ``pinned``, the plan requires it there. ``running`` requests use it now."""

    name: str
    version: str
    rank: int
    slab_bytes: int
    pinned: bool = False
    running: int = 0


class AdapterState(msgspec.Struct, frozen=True, kw_only=True):
    """The adapters of an engine. ``loading`` lists versions, and ``cached`` lists versions in the host cache.

    ``plan_epoch`` is the newest epoch in a PreparePlan or RetireCopies that this incarnation received, 0 if none.
    """

    resident: tuple[ResidentAdapter, ...] = ()
    loading: tuple[str, ...] = ()
    cached: tuple[str, ...] = ()
    plan_epoch: int = 0


class EngineLoad(Message, frozen=True, tag=True, kw_only=True):
    """Reports an engine's current load for routing and planning, every ``engine.load_interval_s``. No answer.

    ``state`` is STARTING, READY, DRAINING or STOPPED.
    """

    engine: str
    incarnation: str
    state: str
    queue: QueueLoad
    memory: MemoryLoad
    speed: MeasuredSpeed
    adapters: AdapterState


class EngineCapabilities(Message, frozen=True, tag=True, kw_only=True):
    """Reports the constants of an engine's incarnation when it is ready, and on AnnounceCapabilities. No answer.

    ``max_step_tokens`` limits the prefill and decode tokens of a step in total. ``abilities`` and ``cache_abilities``
    describe how peers can read adapters from the pool and from the host cache. None means that peers cannot.
    """

    engine: str
    incarnation: str
    kv_blocks: int
    block_tokens: int
    pool_bytes: int
    max_running: int
    max_model_tokens: int
    max_step_tokens: int
    abilities: Abilities | None = None
    cache_abilities: Abilities | None = None


class AnnounceCapabilities(Message, frozen=True, tag=True, kw_only=True):
    """Asks an engine to send EngineCapabilities again, which is the only answer.

    The monitor sends this when it receives a load from an engine whose capabilities it does not know: after a restart
    of the monitor, or after the first EngineCapabilities was lost.
    """


class AdapterTokens(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens computed for one adapter since its ``span`` began. ``version`` "" stands for the base model.

    An engine drops the counts of an adapter that was idle for many reports. When the adapter is used again, its counts
    start at zero in a new span. Spans are numbered within an incarnation. An engine that never drops counts uses 0.
    """

    version: str
    prefill_tokens: int
    decode_tokens: int
    requests: int = 0
    span: int = 0


class ReadCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Counts the slab reads of an engine's incarnation from one source over one transport.

    ``source`` is a peer's name or ``store``. ``failed`` includes the ``mismatched`` reads, whose bytes did not match
    their digests. ``predicted_bytes_per_s`` is the rate predicted for a large slab now, or 0 before the first read.
    """

    source: str
    transport: str
    reads: int = 0
    read_bytes: int = 0
    failed: int = 0
    mismatched: int = 0
    predicted_bytes_per_s: float = 0.0


class PrefetchCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Counts the slab bytes that an engine's incarnation loaded before any request waited for them.

    ``kind`` is the reason: ``plan`` (the plan places the adapter here), ``admission`` (the router announced a request)
    or ``pattern`` (requests for this adapter often follow recent ones). Requests used ``useful_bytes``.
    ``wasted_bytes`` were evicted unused. The other bytes are in the pool and were not used yet.
    """

    kind: str
    loaded_bytes: int = 0
    useful_bytes: int = 0
    wasted_bytes: int = 0


class EngineCounters(msgspec.Struct, frozen=True, kw_only=True):
    """Counts events of an engine's incarnation, for operators.

    ``early_starts`` counts requests whose prefill started during the load of their adapter.
    ``early_starts_in_vain`` of them were undone, mostly because the load took too long. ``leaks`` counts the checks
    that found an inconsistent state, or memory in use while the engine was idle.
    """

    steps: int = 0
    preemptions: int = 0
    prefix_hits_tokens: int = 0
    prefix_queries_tokens: int = 0
    early_starts: int = 0
    early_starts_in_vain: int = 0
    leaks: int = 0
    reads: tuple[ReadCounts, ...] = ()
    prefetched: tuple[PrefetchCounts, ...] = ()


class EngineStatistics(Message, frozen=True, tag=True, kw_only=True):
    """Reports an engine's statistics every ``engine.statistics_interval_s``. No answer.

    The monitor computes the demand from ``adapter_tokens``, which lists the recently used adapters.
    """

    engine: str
    incarnation: str
    counters: EngineCounters
    adapter_tokens: tuple[AdapterTokens, ...] = ()


class FindCopies(Message, frozen=True, tag=True, kw_only=True):
    """Request of an engine: find the engines that hold this adapter. Answered by Copies."""

    version: str


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """A live engine with the adapter in its pool or host cache. ``abilities`` describe how to read it there."""

    engine: str
    incarnation: str
    abilities: Abilities


class Copies(Message, frozen=True, tag=True, kw_only=True):
    """Answer to FindCopies. If there are many holders, it lists only some of them."""

    version: str
    holders: tuple[Holder, ...]


class EngineGone(Message, frozen=True, tag=True, kw_only=True):
    """Publication ``gone`` of the monitor: this incarnation died, was replaced or stopped reporting.

    If ``ended``, its process certainly ended. Otherwise it may still run and send messages.
    """

    engine: str
    incarnation: str
    ended: bool = False
