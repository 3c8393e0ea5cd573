"""Engine -> monitor: its load, every 250 ms, and who else holds an adapter; monitor -> engines: who is gone."""

import msgspec

from loraserve.messages.base import Message
from loraserve.messages.transfer import Abilities


class ResidentAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter in the engine's pool. ``pinned`` by the plan or a running request; ``running`` requests now."""

    name: str
    version: str
    rank: int
    slab_bytes: int
    pinned: bool = False
    running: int = 0


class AdapterTokens(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens computed for one adapter since its ``span`` began; ``version`` "" is the base model.

    An engine forgets what has been idle for many reports and no longer lists it; when it is asked for again, it counts
    from zero in a new span (numbered within the incarnation). Span 0 is the whole incarnation: nothing is forgotten.
    """

    version: str
    prefill_tokens: int
    decode_tokens: int
    requests: int = 0
    span: int = 0


class MeanStep(msgspec.Struct, frozen=True, kw_only=True):
    """What recent steps of one kind held and took, all smoothed alike: as one, it can be held against a prediction.

    Fields are those of StepShape; ``padded_prefill_tokens`` and ``padded_decode_tokens`` are the step's of either kind
    times the largest rank in it.
    """

    duration_s: float
    decode_sequences: float
    kv_tokens: float
    prefill_tokens: float
    prefill_kv_tokens: float
    slab_bytes: float
    rank_tokens: float
    padded_prefill_tokens: float
    padded_decode_tokens: float


class ReadCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Slabs that an engine read from one source over one transport, since its incarnation began.

    ``source`` is a peer's name, or ``store``. ``mismatched`` of the ``failed`` were not what their digests are of.
    ``predicted_bytes_per_s`` is what a large slab is expected to come with now, 0 before the first.
    """

    source: str
    transport: str
    reads: int = 0
    read_bytes: int = 0
    failed: int = 0
    mismatched: int = 0
    predicted_bytes_per_s: float = 0.0


class PrefetchCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Slabs that an engine brought in before a request waited for them, since its incarnation began.

    ``kind``: ``plan`` (the planner wanted them there), ``admission`` (the router said that a request was about to
    come), ``pattern`` (they usually follow what was asked for). ``useful``: a request ran with it before it left the
    pool; ``wasted``: it left without; the rest is there and was not asked for yet.
    """

    kind: str
    loaded_bytes: int = 0
    useful_bytes: int = 0
    wasted_bytes: int = 0


class EngineLoad(Message, frozen=True, tag=True, kw_only=True):
    """What the router prices and the planner plans with; rates and step times are measured."""

    engine: str
    incarnation: str
    state: str
    waiting: int
    running: int
    waiting_prefill_tokens: int
    kv_blocks_total: int
    kv_blocks_free: int
    block_tokens: int
    pool_total_bytes: int
    pool_free_bytes: int
    pool_room_bytes: int
    """The largest slab that would find room in one piece now, if a request wanted it."""
    max_running: int
    decode_step_s: float
    prefill_tokens_per_s: float
    load_bytes_per_s: float = 0.0
    """Of the loads' own time on the link, without what they waited for others there."""
    load_bytes: float = 0.0
    """Of a mean load, which takes these / ``load_bytes_per_s``; 0 before the first."""
    loads: int = 0
    """Counted in the mean one by this incarnation: more than in the report before is news. So are the steps below."""
    decode_step: MeanStep | None = None
    """Of steps without prefill; None before the first. So is the next."""
    decode_steps: int = 0
    prefill_step: MeanStep | None = None
    """Of steps with prefill, what decodes beside it included."""
    prefill_steps: int = 0
    steps: int = 0
    resident: tuple[ResidentAdapter, ...] = ()
    loading: tuple[str, ...] = ()
    adapter_tokens: tuple[AdapterTokens, ...] = ()
    request_ids: tuple[str, ...] = ()
    prefix_hits_tokens: int = 0
    prefix_queries_tokens: int = 0
    preemptions: int = 0
    early_starts: int = 0
    """Requests that began before the last of their adapter was there; in vain where that did not come in time."""
    early_starts_in_vain: int = 0
    max_model_tokens: int = 0
    max_step_tokens: int
    """Of one step, prefill and decode together."""
    leaks: int = 0
    """Times that the engine, idle, found its own state inconsistent or memory held by nobody."""
    plan_epoch: int = 0
    """The newest epoch that this incarnation was asked to prepare or to retire for; 0 before the first."""
    supports: dict[str, str] = msgspec.field(default_factory=dict)
    abilities: Abilities | None = None
    """How peers can read what it holds; None where they cannot."""
    reads: tuple[ReadCounts, ...] = ()
    prefetched: tuple[PrefetchCounts, ...] = ()
    cached: tuple[str, ...] = ()
    """Versions in the host cache; some of them may be resident as well."""
    cache_abilities: Abilities | None = None
    """How peers can read those; None where they cannot."""


class FindCopies(Message, frozen=True, tag=True, kw_only=True):
    """Answered by Copies, as of the engines' last reports."""

    version: str


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """An engine that had the adapter resident or cached, and lived, when it was heard of last; ``abilities`` are those
    with which it is read there."""

    engine: str
    incarnation: str
    abilities: Abilities


class Copies(Message, frozen=True, tag=True, kw_only=True):
    """Some of the engines that hold it, not all where there are many."""

    version: str
    holders: tuple[Holder, ...]


class EngineGone(Message, frozen=True, tag=True, kw_only=True):
    """Publication ``gone``: this incarnation was silent for too long, or another took its place."""

    engine: str
    incarnation: str
