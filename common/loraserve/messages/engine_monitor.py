"""Engine -> monitor: load, statistics, capabilities; monitor -> engines: holders of an adapter, engines that died."""

import msgspec

from loraserve.messages.base import Message
from loraserve.messages.transfer import Abilities


class QueueLoad(msgspec.Struct, frozen=True, kw_only=True):
    """Requests of an engine. ``waiting_prefill_tokens``: prompt tokens that are still to be computed, of all requests.

    ``request_ids`` lists all requests, running and waiting.
    """

    waiting: int = 0
    running: int = 0
    waiting_prefill_tokens: int = 0
    request_ids: tuple[str, ...] = ()


class MemoryLoad(msgspec.Struct, frozen=True, kw_only=True):
    """Free memory of an engine. ``pool_room_bytes``: the largest slab that fits now, after evictions."""

    kv_blocks_free: int
    pool_free_bytes: int
    pool_room_bytes: int


class MeanStep(msgspec.Struct, frozen=True, kw_only=True):
    """Smoothed means of recent steps of one kind: what they contained and how long they took.

    All fields are smoothed alike, so the struct as a whole can be compared with a prediction. The fields are those of
    StepShape. ``padded_prefill_tokens`` and ``padded_decode_tokens`` are a step's tokens of that kind times the largest
    rank in the step.
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
    """Smoothed means of recent adapter loads. A mean load takes ``slab_bytes / bytes_per_s``.

    The time does not include what a load waited for other loads on the link.
    """

    slab_bytes: float
    bytes_per_s: float


class MeasuredSpeed(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine measured; None before the first measurement.

    ``decode_step`` is of steps without prefill, ``prefill_step`` of steps with prefill, whatever decodes beside it.
    ``decode_steps``, ``prefill_steps`` and ``loads`` count the measurements of this incarnation: a larger count than in
    the last report means that the mean contains something new.
    """

    decode_step: MeanStep | None = None
    decode_steps: int = 0
    prefill_step: MeanStep | None = None
    prefill_steps: int = 0
    load: MeanLoad | None = None
    loads: int = 0

    @property
    def decode_step_s(self) -> float:
        """Seconds of a mean step without prefill; 0 before the first."""
        return self.decode_step.duration_s if self.decode_step else 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prefill tokens per second of steps with prefill; 0 before the first."""
        step = self.prefill_step
        return step.prefill_tokens / step.duration_s if step and step.duration_s else 0.0


class ResidentAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter in the engine's pool. ``pinned``: the plan wants it there; ``running``: requests that use it now."""

    name: str
    version: str
    rank: int
    slab_bytes: int
    pinned: bool = False
    running: int = 0


class AdapterState(msgspec.Struct, frozen=True, kw_only=True):
    """Adapters of an engine. ``loading`` and ``cached`` (in the host cache, perhaps also resident) are versions.

    ``plan_epoch`` is the newest epoch that this incarnation was asked to prepare or to retire for; 0 before the first.
    """

    resident: tuple[ResidentAdapter, ...] = ()
    loading: tuple[str, ...] = ()
    cached: tuple[str, ...] = ()
    plan_epoch: int = 0


class EngineLoad(Message, frozen=True, tag=True, kw_only=True):
    """Sent by an engine every ``engine.load_interval_s``; no answer. What routing and planning need to know at once.

    ``state`` is that of Pong.
    """

    engine: str
    incarnation: str
    state: str
    queue: QueueLoad
    memory: MemoryLoad
    speed: MeasuredSpeed
    adapters: AdapterState


class EngineCapabilities(Message, frozen=True, tag=True, kw_only=True):
    """Sent by an engine when it is ready, and again on AnnounceCapabilities; no answer. Constant for an incarnation.

    ``max_step_tokens`` counts the prefill and decode tokens of one step together. ``abilities`` and ``cache_abilities``
    say how peers can read adapters from the pool and from the host cache; None means not at all.
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
    """Sent by the monitor to an engine whose incarnation it has a load of but not the capabilities.

    That happens when the monitor was restarted or the first EngineCapabilities was lost. The engine sends
    EngineCapabilities again.
    """


class AdapterTokens(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens computed for one adapter since its ``span`` began; ``version`` "" is the base model.

    An engine forgets an adapter that was idle for many reports and no longer lists it. When the adapter is used again,
    it counts from zero in a new span (numbered within the incarnation). Span 0 means that nothing is ever forgotten.
    """

    version: str
    prefill_tokens: int
    decode_tokens: int
    requests: int = 0
    span: int = 0


class ReadCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Slabs that an engine read from one source over one transport since its incarnation began.

    ``source`` is a peer's name or ``store``. ``mismatched`` of the ``failed`` reads returned bytes that did not match
    their digests. ``predicted_bytes_per_s`` is the rate expected for a large slab now; 0 before the first read.
    """

    source: str
    transport: str
    reads: int = 0
    read_bytes: int = 0
    failed: int = 0
    mismatched: int = 0
    predicted_bytes_per_s: float = 0.0


class PrefetchCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Slabs that an engine loaded before a request waited for them, since its incarnation began.

    ``kind`` is why: ``plan`` (the planner wants them there), ``admission`` (the router announced a request),
    ``pattern`` (they usually follow adapters that were requested). ``useful``: a request ran with the slab before it
    left the pool; ``wasted``: it left without that. The rest is in the pool and was not requested yet.
    """

    kind: str
    loaded_bytes: int = 0
    useful_bytes: int = 0
    wasted_bytes: int = 0


class EngineCounters(msgspec.Struct, frozen=True, kw_only=True):
    """Counts since the incarnation began, for operators.

    ``early_starts``: requests that started before their adapter was complete; of these, ``early_starts_in_vain`` had to
    wait because it was not complete in time. ``leaks``: how often the idle engine found its own state inconsistent or
    memory that nobody holds.
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
    """Sent by an engine every ``engine.statistics_interval_s``; no answer. The demand for adapters is made from these.

    ``adapter_tokens`` lists the adapters that were used lately.
    """

    engine: str
    incarnation: str
    counters: EngineCounters
    adapter_tokens: tuple[AdapterTokens, ...] = ()


class FindCopies(Message, frozen=True, tag=True, kw_only=True):
    """Request of an engine: who has this adapter? Answered by Copies, from the engines' last reports."""

    version: str


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """A live engine that has the adapter resident or cached, and the ``abilities`` with which it can be read there."""

    engine: str
    incarnation: str
    abilities: Abilities


class Copies(Message, frozen=True, tag=True, kw_only=True):
    """Answer to FindCopies. Names some of the holders, not all if there are many."""

    version: str
    holders: tuple[Holder, ...]


class EngineGone(Message, frozen=True, tag=True, kw_only=True):
    """Publication ``gone`` of the monitor, for engines: this incarnation died, or was replaced by a new one."""

    engine: str
    incarnation: str
