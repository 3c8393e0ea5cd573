"""The router's view of one engine: its last report and the requests that this router has sent since.

A request is *pending* from the time it is sent until a report counts it.
"""

from collections.abc import Iterable, Mapping
from itertools import pairwise
from math import expm1, inf

import msgspec

from loraserve.cost import largest_extent_bytes
from loraserve.messages import EngineCapabilities, EngineLoad, EngineSeen

TIMEOUTS_TO_AVOID = 2
FIRST_AVOIDANCE_S = 0.5
MAX_AVOIDANCE_S = 8.0
CONTINUATION = 0.5
"""Assumed fraction of running requests that a request of equal rank follows. A larger value sends fewer requests to an
engine whose load exceeds the plan's demand. A smaller value follows the plan longer."""
IDLE_STEP_S = 0.02
"""Assumed decode step of an engine that has not decoded yet."""


class PendingRequest(msgspec.Struct, frozen=True, gc=False):
    """A request that this router sent and no report has counted yet. ``tokens``: prompt tokens that need prefill."""

    tokens: int
    version: str
    since_s: float
    rank: int = 0
    slab_bytes: int = 0


class RunningRequest(msgspec.Struct, frozen=True, gc=False):
    """A running request and its engine. The adapter is known only if this router sent the request."""

    engine: str
    since_s: float
    version: str = ""
    rank: int = 0


class AdapterMix(msgspec.Struct, frozen=True, gc=False):
    """Slab bytes and ranks of the adapters of an engine's requests.

    Attributes:
        slab_bytes: Sum of the slabs of the adapters that running requests use.
        rank_sum: Sum of the ranks of running requests.
        running_rank: The largest rank of running requests.
        largest_rank: The largest rank of running and waiting requests.
        expected_rank: The estimated mean over time of the largest rank in a batch. A rarely requested large rank
            hardly raises it. None if the plan has no copy on the engine.
    """

    slab_bytes: int = 0
    rank_sum: int = 0
    running_rank: int = 0
    largest_rank: int = 0
    expected_rank: float | None = None


class PendingAdapters(msgspec.Struct):
    """The adapters of pending requests. ``slab_bytes`` leaves out adapters that are already active on the engine."""

    versions: set[str] = msgspec.field(default_factory=set)
    slab_bytes: int = 0
    rank_sum: int = 0
    largest_rank: int = 0

    def add(self, pending: PendingRequest, active: frozenset[str]) -> None:
        """Count one more request; ``active`` are the adapter versions of requests that a report has counted."""
        if not pending.version:
            return
        if pending.version not in self.versions and pending.version not in active:
            self.slab_bytes += pending.slab_bytes
        self.versions.add(pending.version)
        self.rank_sum += pending.rank
        self.largest_rank = max(self.largest_rank, pending.rank)


class EngineView(msgspec.Struct):
    """The view of one engine; ``resident``, ``loading`` and ``active`` are adapter versions.

    Attributes:
        column: The engine's column in the price table; -1 if it takes no requests.
        active: Adapters of requests that run or wait there, without pending requests.
        adapters: Slab bytes and ranks of the active adapters.
        listed: Versions for which ``ClusterView.engines_with`` lists this engine.
        largest_extent_bytes: The largest extent that its pool can ever provide.
        room_bytes: The largest extent that its pool can provide now.
        pending: Requests that no report has counted yet, in the order in which they were sent.
        expected: By adapter version, when the router told the engine to load the adapter, oldest first.
        timeouts: Number of unanswered requests since the engine last admitted a request.
        avoided_since_s: When the engine began to be avoided because of timeouts; None if it is not avoided.
        avoidance_s: Seconds after which a report of the live engine ends the avoidance.
        drained: Whether the plan drains the engine.
        ended: Whether the engine's process certainly ended.
    """

    name: str
    load: EngineLoad
    capabilities: EngineCapabilities
    reported_s: float
    alive: bool
    column: int = -1
    resident: frozenset[str] = frozenset()
    loading: frozenset[str] = frozenset()
    active: frozenset[str] = frozenset()
    adapters: AdapterMix = AdapterMix()
    listed: set[str] = msgspec.field(default_factory=set)
    largest_extent_bytes: int = 0
    room_bytes: int = 0
    pending: dict[str, PendingRequest] = msgspec.field(default_factory=dict)
    expected: dict[str, float] = msgspec.field(default_factory=dict)
    pending_tokens: int = 0
    pending_adapters: PendingAdapters = msgspec.field(default_factory=PendingAdapters)
    timeouts: int = 0
    avoided_since_s: float | None = None
    avoidance_s: float = 0.0
    drained: bool = False
    ended: bool = False

    @property
    def requests(self) -> int:
        return self.load.queue.running + self.load.queue.waiting + len(self.pending)

    @property
    def is_ready(self) -> bool:
        return self.alive and self.load.state == "READY"

    @property
    def may_serve(self) -> bool:
        """Return whether an engine that the monitor does not hear may serve requests, as far as this router knows."""
        return not self.alive and not self.ended and self.load.state == "READY" and self.avoided_since_s is None

    @property
    def fallback_level(self) -> int:
        """0 for a normal engine, 1 if drained, 2 if avoided, 3 if both. Engines with higher levels are asked later."""
        return self.drained + 2 * (self.avoided_since_s is not None)

    @property
    def oldest_s(self) -> float:
        """Send time of the oldest pending request or expected adapter; infinite if there is none."""
        request_s = next(iter(self.pending.values())).since_s if self.pending else inf
        return min(request_s, next(iter(self.expected.values()), inf))

    def has(self, version: str) -> bool:
        begun = version in self.loading or version in self.expected
        return begun or version in self.resident or version in self.pending_adapters.versions

    def apply_report(
        self, seen: EngineSeen, reported_s: float, known: Iterable[RunningRequest], decoded: Mapping[str, float]
    ) -> None:
        """Replace the last report. A new incarnation also clears pending requests, expected adapters and timeouts.

        ``known`` are the reported requests. Those without a known adapter are ignored. ``decoded``: by adapter
        version, the decoded tokens/s per engine with the adapter, from the monitor's demand; empty if unknown.
        """
        load = seen.load
        if load.incarnation != self.load.incarnation:
            self.pending, self.expected = {}, {}
            self.clear_timeouts()
        self.load, self.capabilities, self.reported_s = load, seen.capabilities, reported_s
        self.alive, self.ended = seen.alive, seen.ended
        self.loading = frozenset(load.adapters.loading)
        self.largest_extent_bytes = largest_extent_bytes(seen.capabilities.pool_bytes)
        self.room_bytes = load.memory.pool_room_bytes
        self._apply_adapters(load, known, decoded)
        self._recount_pending()
        if self.alive and self.avoided_since_s is not None and reported_s >= self.avoided_since_s + self.avoidance_s:
            self._try_again()

    def expect(self, version: str, now: float) -> None:
        self.expected.pop(version, None)
        self.expected[version] = now

    def add_pending(self, request_id: str, pending: PendingRequest) -> None:
        self.drop_pending([request_id])
        self.pending[request_id] = pending
        self.pending_tokens += pending.tokens
        self.pending_adapters.add(pending, self.active)

    def drop_pending(self, request_ids: Iterable[str]) -> None:
        removed = [request_id for request_id in request_ids if self.pending.pop(request_id, None)]
        if removed:
            self._recount_pending()

    def drop_older(self, before_s: float) -> None:
        """Remove pending requests and expected adapters that were sent before ``before_s``."""
        self.drop_pending([request_id for request_id, p in self.pending.items() if p.since_s < before_s])
        self.expected = {version: since_s for version, since_s in self.expected.items() if since_s >= before_s}

    def clear_adapters(self) -> None:
        """Forget the adapters of an engine that restarted since its last report, because its pool is now empty."""
        self.resident = self.loading = self.active = frozenset()
        self.expected = {}
        self.adapters = AdapterMix()
        self._recount_pending()

    def record_timeout(self, now: float) -> None:
        """Count an unanswered request. After ``TIMEOUTS_TO_AVOID`` unanswered requests the engine is avoided."""
        self.timeouts += 1
        if self.timeouts >= TIMEOUTS_TO_AVOID and self.avoided_since_s is None:
            self.avoided_since_s = now
            self.avoidance_s = min(MAX_AVOIDANCE_S, max(FIRST_AVOIDANCE_S, 2 * self.avoidance_s))

    def retry_unheard(self, now: float) -> None:
        """End the avoidance of an engine that the monitor does not hear after ``avoidance_s``: no report can end it."""
        if not self.alive and self.avoided_since_s is not None and now >= self.avoided_since_s + self.avoidance_s:
            self._try_again()

    def clear_timeouts(self) -> None:
        self.timeouts, self.avoided_since_s, self.avoidance_s = 0, None, 0.0

    def _try_again(self) -> None:
        # A report does not prove that the engine serves requests. After one more timeout it is avoided for longer.
        self.avoided_since_s, self.timeouts = None, TIMEOUTS_TO_AVOID - 1

    def _recount_pending(self) -> None:
        self.pending_tokens = sum(p.tokens for p in self.pending.values())
        self.pending_adapters = PendingAdapters()
        for pending in self.pending.values():
            self.pending_adapters.add(pending, self.active)

    def _apply_adapters(self, load: EngineLoad, known: Iterable[RunningRequest], decoded: Mapping[str, float]) -> None:
        # A single pass, because a thousand engines may report hundreds of adapters each, four times a second.
        slab_bytes = rank_sum = running_rank = 0
        planned: dict[int, float] = {}
        running: dict[int, int] = {}
        resident, active = [], []
        for adapter in load.adapters.resident:
            resident.append(adapter.version)
            if adapter.running > 0:
                active.append(adapter.version)
                slab_bytes += adapter.slab_bytes
                rank_sum += adapter.running * adapter.rank
                running[adapter.rank] = running.get(adapter.rank, 0) + adapter.running
                if adapter.rank > running_rank:
                    running_rank = adapter.rank
            if adapter.pinned:
                planned[adapter.rank] = planned.get(adapter.rank, 0.0) + decoded.get(adapter.version, 0.0)
        largest_rank = running_rank
        for request in known:
            if request.version:
                active.append(request.version)
                largest_rank = max(largest_rank, request.rank)
        self.resident, self.active = frozenset(resident), frozenset(active)
        expected_rank: float | None = max(planned, default=None)
        if decoded and planned:
            step_s = load.speed.decode_step_s if 0 < load.speed.decode_step_s < inf else IDLE_STEP_S
            demanded = {rank: tokens * step_s for rank, tokens in planned.items()}
            ranks = demanded.keys() | running.keys()
            sequences = {rank: max(demanded.get(rank, 0.0), CONTINUATION * running.get(rank, 0)) for rank in ranks}
            expected_rank = mean_largest_rank(sequences)
        self.adapters = AdapterMix(slab_bytes, rank_sum, running_rank, largest_rank, expected_rank)


def mean_largest_rank(sequences: Mapping[int, float]) -> float:
    """Return the mean over time of the largest rank in a batch. ``sequences``: by rank, their mean number.

    Sequences are assumed to arrive independently (Poisson). If n is the mean number of sequences of rank r or more,
    none is present for a fraction exp(-n) of the time. The mean largest rank is the integral over r of 1 - exp(-n).
    """
    above, largest = 0.0, 0.0
    for rank, below in pairwise([*sorted(sequences, reverse=True), 0]):
        above += sequences[rank]
        largest -= (rank - below) * expm1(-above)
    return largest
