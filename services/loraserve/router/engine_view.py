"""One engine as the router believes it to be: its last report in the form in which requests are priced, and what this
router has sent there since. Pure."""

from collections.abc import Iterable, Mapping
from itertools import pairwise
from math import expm1, inf
from types import MappingProxyType

import msgspec

from loraserve.cost import largest_extent_bytes
from loraserve.messages import EngineLoad

TIMEOUTS_TO_AVOID = 2
FIRST_AVOIDANCE_S = 0.5
LONGEST_AVOIDANCE_S = 8.0
GOES_ON = 0.5
"""Of the requests that run, so many are taken to be followed by one of their rank: with more of them an engine that
falls behind the plan's demand is helped sooner, with less the plan's order lasts longer near the limit."""
IDLE_STEP_S = 0.02
"""Of decoding, where an engine has not done any yet."""
_NOTHING: Mapping[str, float] = MappingProxyType({})


class Pending(msgspec.Struct, frozen=True, gc=False):
    """A request this router sent to an engine and no report has counted yet. ``tokens`` of it need prefill."""

    tokens: int
    version: str
    since_s: float
    rank: int = 0
    slab_bytes: int = 0


class Live(msgspec.Struct, frozen=True, gc=False):
    """Where a request runs; the adapter is known only of what this router sent."""

    engine: str
    since_s: float
    version: str = ""
    rank: int = 0


class Mix(msgspec.Struct, frozen=True, gc=False):
    """Adapters of an engine's requests, as far as steps pay for them.

    ``slab_bytes`` of the distinct ones that run, ``rank_sum`` over the requests that run; ``largest_rank`` also of
    those that wait. ``expected_rank``: the largest at a time, on average, of the copies that the plan keeps there and
    of what runs there beside them; a rank that is hardly ever asked for widens nobody, and where several of one run
    that the plan knows nothing of, it is no longer the next that widens the others. None where the plan keeps nothing.
    """

    slab_bytes: int = 0
    rank_sum: int = 0
    running_rank: int = 0
    largest_rank: int = 0
    expected_rank: float | None = None


class PendingMix(msgspec.Struct):
    """The same of pending requests. ``versions``: all of their adapters; ``slab_bytes``: of those that no report has
    active."""

    versions: set[str] = msgspec.field(default_factory=set)
    slab_bytes: int = 0
    rank_sum: int = 0
    largest_rank: int = 0

    def add(self, pending: Pending, active: frozenset[str]) -> None:
        if not pending.version:
            return
        if pending.version not in self.versions and pending.version not in active:
            self.slab_bytes += pending.slab_bytes
        self.versions.add(pending.version)
        self.rank_sum += pending.rank
        self.largest_rank = max(self.largest_rank, pending.rank)


class EngineView(msgspec.Struct):
    """``column``: its place in the table of prices, -1 where it takes no requests."""

    name: str
    load: EngineLoad
    reported_s: float
    alive: bool
    column: int = -1
    resident: frozenset[str] = frozenset()
    loading: frozenset[str] = frozenset()
    active: frozenset[str] = frozenset()
    """Versions of requests that run or wait there, pending ones left out."""
    mix: Mix = Mix()
    listed: set[str] = msgspec.field(default_factory=set)
    """Versions that the cluster's view lists this engine for."""
    largest_extent_bytes: int = 0
    room_bytes: int = 0
    """The largest slab that the pool has room for now, if a request wants it."""
    pending: dict[str, Pending] = msgspec.field(default_factory=dict)
    expected: dict[str, float] = msgspec.field(default_factory=dict)
    """Versions that the engine was told to expect, and since when; oldest first."""
    pending_tokens: int = 0
    pending_mix: PendingMix = msgspec.field(default_factory=PendingMix)
    timeouts: int = 0
    avoided_since_s: float | None = None
    avoidance_s: float = 0.0
    drained: bool = False
    """The plan empties it: requests go there only where nobody else answers."""

    @property
    def requests(self) -> int:
        return self.load.running + self.load.waiting + len(self.pending)

    @property
    def is_ready(self) -> bool:
        return self.alive and self.load.state == "READY"

    @property
    def reluctance(self) -> int:
        """0 where it is asked in its turn, more where it is asked last: those that are drained, then the silent."""
        return self.drained + 2 * (self.avoided_since_s is not None)

    def take(
        self,
        load: EngineLoad,
        reported_s: float,
        alive: bool,
        known: Iterable[Live] = (),
        decoded: Mapping[str, float] = _NOTHING,
    ) -> None:
        """A report. ``known``: of its requests, those whose adapter is known. ``decoded``: by version, tokens a second
        at each copy; empty where nothing is known of any. Of another incarnation it makes all that was known of the
        engine void."""
        if load.incarnation != self.load.incarnation:
            self.pending, self.expected = {}, {}
            self.timeouts, self.avoided_since_s, self.avoidance_s = 0, None, 0.0
        self.load, self.reported_s, self.alive = load, reported_s, alive
        self.loading = frozenset(load.loading)
        self.largest_extent_bytes = largest_extent_bytes(load.pool_total_bytes)
        self.room_bytes = load.pool_room_bytes
        self._take_adapters(load, known, decoded)
        self._count_pending()
        if alive and self.avoided_since_s is not None and reported_s >= self.avoided_since_s + self.avoidance_s:
            # One more timeout and it is avoided again, for longer: reports alone do not prove that it serves.
            self.avoided_since_s, self.timeouts = None, TIMEOUTS_TO_AVOID - 1

    def _take_adapters(self, load: EngineLoad, known: Iterable[Live], decoded: Mapping[str, float]) -> None:
        """One pass over what may be hundreds of adapters, four times a second, for each of a thousand engines."""
        slab_bytes = rank_sum = running_rank = 0
        planned: dict[int, float] = {}
        runs: dict[int, int] = {}
        resident, active = [], []
        for adapter in load.resident:
            resident.append(adapter.version)
            if adapter.running > 0:
                active.append(adapter.version)
                slab_bytes += adapter.slab_bytes
                rank_sum += adapter.running * adapter.rank
                runs[adapter.rank] = runs.get(adapter.rank, 0) + adapter.running
                if adapter.rank > running_rank:
                    running_rank = adapter.rank
            if adapter.pinned:
                planned[adapter.rank] = planned.get(adapter.rank, 0.0) + decoded.get(adapter.version, 0.0)
        largest_rank = running_rank
        for live in known:
            if live.version:
                active.append(live.version)
                largest_rank = max(largest_rank, live.rank)
        self.resident, self.active = frozenset(resident), frozenset(active)
        expected_rank: float | None = max(planned, default=None)
        if decoded and planned:
            step_s = load.decode_step_s if 0 < load.decode_step_s < inf else IDLE_STEP_S
            kept = {rank: tokens * step_s for rank, tokens in planned.items()}
            ranks = kept.keys() | runs.keys()
            sequences = {rank: max(kept.get(rank, 0.0), GOES_ON * runs.get(rank, 0)) for rank in ranks}
            expected_rank = largest_at_a_time(sequences)
        self.mix = Mix(slab_bytes, rank_sum, running_rank, largest_rank, expected_rank)

    @property
    def oldest_s(self) -> float:
        """When the first of what no report has counted yet was sent."""
        request_s = next(iter(self.pending.values())).since_s if self.pending else inf
        return min(request_s, next(iter(self.expected.values()), inf))

    def has(self, version: str) -> bool:
        """It is there, or on its way."""
        begun = version in self.loading or version in self.expected
        return begun or version in self.resident or version in self.pending_mix.versions

    def expect(self, version: str, now: float) -> None:
        self.expected.pop(version, None)
        self.expected[version] = now

    def drop_older(self, before_s: float) -> None:
        """Of what no report has counted yet."""
        self.drop_pending([request_id for request_id, p in self.pending.items() if p.since_s < before_s])
        self.expected = {version: since_s for version, since_s in self.expected.items() if since_s >= before_s}

    def add_pending(self, request_id: str, pending: Pending) -> None:
        """In place of what it was before."""
        self.drop_pending([request_id])
        self.pending[request_id] = pending
        self.pending_tokens += pending.tokens
        self.pending_mix.add(pending, self.active)

    def drop_pending(self, request_ids: Iterable[str]) -> None:
        gone = [request_id for request_id in request_ids if self.pending.pop(request_id, None)]
        if gone:
            self._count_pending()

    def _count_pending(self) -> None:
        self.pending_tokens = sum(p.tokens for p in self.pending.values())
        self.pending_mix = PendingMix()
        for pending in self.pending.values():
            self.pending_mix.add(pending, self.active)

    def emptied(self) -> None:
        """It was restarted since its last report: its pool is empty."""
        self.resident = self.loading = self.active = frozenset()
        self.expected = {}
        self.mix = Mix()
        self._count_pending()

    def timed_out(self, now: float) -> None:
        self.timeouts += 1
        if self.timeouts >= TIMEOUTS_TO_AVOID and self.avoided_since_s is None:
            self.avoided_since_s = now
            self.avoidance_s = min(LONGEST_AVOIDANCE_S, max(FIRST_AVOIDANCE_S, 2 * self.avoidance_s))

    def answered(self) -> None:
        self.timeouts, self.avoided_since_s, self.avoidance_s = 0, None, 0.0


# MERGED: loraserve.router.engine_view
# """Which rank an engine's batches have, of the copies that it keeps. Pure."""


def largest_at_a_time(sequences: Mapping[int, float]) -> float:
    """The largest rank in a batch, on average over time; ``sequences``: by rank, how many of it decode at a time.

    They are taken to come independently: none of rank r or more is there for exp(-n) of the time, n being all of these
    (Poisson), and the mean of the largest is the integral over r of the time that there is one.
    """
    above, largest = 0.0, 0.0
    for rank, below in pairwise([*sorted(sequences, reverse=True), 0]):
        above += sequences[rank]
        largest -= (rank - below) * expm1(-above)
    return largest
