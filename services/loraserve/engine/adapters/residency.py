"""What a plan that is being prepared still wants in the pool, and what it could not get. Pure."""

from collections.abc import Callable, Collection, Iterable, Iterator
from math import inf

import msgspec

from loraserve.engine.adapters.lifecycle import Entry
from loraserve.engine.adapters.pool import AdapterPool
from loraserve.engine.adapters.prefetch import SPARES_S, Brought, Guesses, Kind, PrefetchTally
from loraserve.engine.schedule.events import (
    AdapterExpected,
    CancelLoad,
    CopiesRetired,
    EvictAdapter,
    Instruction,
    LeasesEnded,
    LeftSlab,
    LoadAdapter,
    PlanPrepared,
    PlanReady,
    SchedulerLimits,
)
from loraserve.messages import AdapterRef, PrefetchCounts
from loraserve.story import Story


class PlanWishes:
    """Of one plan at a time; it is answered once nothing is wanted any more."""

    def __init__(self, pool: AdapterPool) -> None:
        self._pool = pool
        self.newest_epoch = 0
        """The newest plan that was heard of, 0 before the first."""
        self._epoch: int | None = None
        self.wanted: dict[str, AdapterRef] = {}
        self._failed: dict[str, str] = {}

    def begin(self, epoch: int, adapters: Collection[AdapterRef]) -> list[Instruction]:
        """A plan that was still being prepared is given up."""
        ended = self._end("a newer plan came") if self._epoch is not None else []
        self._epoch = self.newest_epoch = epoch
        self.wanted = {adapter.version: adapter for adapter in adapters}
        self._failed = {}
        return ended

    def retire(self, epoch: int, kept: Collection[str]) -> None:
        """Nothing that a plan up to ``epoch`` wanted is wanted any more, but what is kept."""
        self.newest_epoch = max(self.newest_epoch, epoch)
        if self._epoch is not None and self._epoch <= epoch:
            for version in self.wanted.keys() - kept:
                self.fail(version, f"epoch {epoch} does without it")

    def settle(self, version: str) -> None:
        """It is resident: pinned, if it is wanted."""
        if self.wanted.pop(version, None) is not None:
            assert self._epoch is not None, "nothing is wanted but by a plan that is being prepared"
            self._pool.plan(version, True, self._epoch)

    def fail(self, version: str, message: str) -> None:
        if self.wanted.pop(version, None) is not None:
            self._failed[version] = message

    def done(self) -> list[Instruction]:
        """The answer, once there is one."""
        if self._epoch is None or self.wanted:
            return []
        done = PlanReady(self._epoch, self._failed)
        self._epoch, self._failed = None, {}
        return [done]

    def _end(self, reason: str) -> list[Instruction]:
        for version in list(self.wanted):
            self.fail(version, reason)
        return self.done()


REST = 7.0
"""Times what a load took, before the next may begin."""
LONGEST_REST_S = 0.2
"""Loads that take long are of slabs so large that what they cost beside their bytes does not count; and a plan that is
prepared for ever is none."""


class Pace:
    """One load of the plan at a time, and a rest after each, for as long as steps run."""

    def __init__(self) -> None:
        self._began_s: dict[str, float] = {}
        self._rests_until_s = 0.0

    def began(self, version: str, now: float) -> None:
        """A load of the plan."""
        self._began_s[version] = now

    def look(self, is_loading: Callable[[str], bool], now: float) -> None:
        """Whatever loads no more has ended."""
        for version in [version for version in self._began_s if not is_loading(version)]:
            took_s = now - self._began_s.pop(version)
            self._rests_until_s = now + min(LONGEST_REST_S, REST * took_s)

    def allows(self, now: float, stepping: bool) -> bool:
        """Where nothing is computed there is nothing to spare."""
        return not stepping or (not self._began_s and now >= self._rests_until_s)


class _Look(msgspec.Struct):
    """One look at all that could begin to load. ``keep`` stays; what is as large as ``no_room_bytes`` finds no room;
    leases on ``awaited`` have to end for some."""

    now: float
    stepping: bool
    instructions: list[Instruction]
    keep: set[str] = msgspec.field(default_factory=set)
    no_room_bytes: float = inf
    awaited: frozenset[str] = frozenset()


class Residency:
    """The pool, its loads and the plan's wishes."""

    def __init__(self, limits: SchedulerLimits, story: Story) -> None:
        self.pool = AdapterPool(limits.pool_bytes, limits.max_adapters, max_rank=limits.max_rank)
        self._max_loads = limits.max_loads
        self._story = story
        self._plan = PlanWishes(self.pool)
        self._guesses = Guesses()
        self._tally = PrefetchTally()
        self._pace = Pace()

    @property
    def plan_epoch(self) -> int:
        """Of the newest plan that was heard of, 0 before the first."""
        return self._plan.newest_epoch

    def ready(self, version: str) -> bool:
        """The base model always is."""
        entry = self.pool.get(version)
        return version == "" or (entry is not None and entry.resident and version not in self.pool.damaged)

    def handle(
        self, event: PlanPrepared | CopiesRetired | LeasesEnded | AdapterExpected, now: float
    ) -> list[Instruction]:
        match event:
            case PlanPrepared(epoch, adapters):
                return self.prepare(epoch, adapters)
            case CopiesRetired(epoch, keep):
                return self.retire(epoch, keep)
            case AdapterExpected(adapter):
                self._expect(adapter, Kind.ADMISSION, now)
                return []
            case LeasesEnded():
                return []

    def arrived(self, adapter: AdapterRef, now: float) -> None:
        """A request for it is here: what usually follows is expected."""
        for follower in self._guesses.arrived(adapter, now):
            self._expect(follower, Kind.PATTERN, now)

    def prepare(self, epoch: int, adapters: tuple[AdapterRef, ...]) -> list[Instruction]:
        """The plan wants these; a plan that was still being prepared is given up.

        What a planner asked for before it died may come after what its successor asked for: it is refused.
        """
        if epoch < self.plan_epoch:
            late = f"epoch {epoch} is older than epoch {self.plan_epoch}, which was asked for here already"
            return [PlanReady(epoch, dict.fromkeys((a.version for a in adapters), late))]
        ended = self._plan.begin(epoch, adapters)
        for adapter in adapters:
            refusal = self.pool.refusal(adapter)
            if refusal is not None:
                self._plan.fail(adapter.version, refusal)
            elif self.ready(adapter.version):
                self._plan.settle(adapter.version)
        return [*ended, *self._plan.done()]

    def retire(self, epoch: int, keep: tuple[str, ...]) -> list[Instruction]:
        """Nothing that a plan up to ``epoch`` wanted is wanted any more, but ``keep``: pins go, and loads to come.

        Newer plans are not touched. A plan that was prepared and never published goes with the next epoch that is.
        """
        kept = set(keep)
        for entry in self.pool.entries():
            if entry.planned_epoch <= epoch and entry.adapter.version not in kept:
                self.pool.plan(entry.adapter.version, False)
        self._plan.retire(epoch, kept)
        return self._plan.done()

    def loaded(self, version: str) -> list[Instruction]:
        for brought in _brought([self.pool.loaded(version)]):
            self._tally.loaded(brought)
        self._guesses.drop(version)
        self._plan.settle(version)
        return self._plan.done()

    def load_failed(self, version: str, message: str) -> list[Instruction]:
        gone = self.pool.load_failed(version)
        self._guesses.failed(version)
        self._plan.fail(version, message)
        return [*_never_was(gone), *self._plan.done()]

    def load_cancelled(self, version: str) -> list[Instruction]:
        """Whoever wants it by now gets another load."""
        return _never_was(self.pool.load_failed(version))

    def start_loads(
        self, requested: Iterable[AdapterRef], now: float, idle: bool, stepping: bool = False
    ) -> list[Instruction]:
        """Begin what there is room for: what requests wait for, what they are about to come for, the plan's, and what
        usually follows.

        ``requested`` is in order of arrival: nobody's adapter leaves for that of a later request, or two requests could
        take turns in loading and neither would run. ``idle`` says that no request is left, so that room which is
        missing now will not come by waiting; ``stepping`` that steps run, whose ends bring another look soon. What is
        on its way for nobody any more is cancelled.
        """
        self._pace.look(self.pool.is_loading, now)
        requested = list(requested)
        self._guesses.expire(now)
        look = _Look(now, stepping, [*self._drop_damaged(), *self._cancel_unwanted(requested, now)])
        # Whoever is expected comes before the plan in a moment; what may follow must not hold up anybody.
        if self._load_requested(requested, look) and self._load_expected(look) and self._load_planned(idle, look):
            self.pool.await_leases(look.awaited)
            self._load_usual(look)
        else:
            # Not all were looked at: what was awaited for the others still is, or readers could take turns for ever.
            self.pool.await_also(look.awaited)
        return [*look.instructions, *self._plan.done()]

    def in_the_way(self, adapter: AdapterRef | None, places: int) -> frozenset[str]:
        """What has to leave for an adapter that waits for room; see AdapterPool."""
        if adapter is None or adapter.version in self.pool:
            return frozenset()
        return self.pool.in_the_way(adapter, places)

    def prefetched(self) -> tuple[PrefetchCounts, ...]:
        """What was brought in before a request waited for it, and what came of it."""
        return self._tally.counts(_brought(entry for entry in self.pool.entries() if entry.resident))

    def validate(self) -> None:
        """Raises AssertionError naming what broke."""
        self.pool.validate()
        self._guesses.validate()

    def _expect(self, adapter: AdapterRef, kind: Kind, now: float) -> None:
        if self.ready(adapter.version) or self.pool.refusal(adapter) is not None:
            return
        if self._guesses.expect(adapter, kind, now):
            self._story.tell(adapter.version, now, f"expected: {kind}")

    def _drop_damaged(self) -> list[Instruction]:
        """Whoever wants it gets it anew; the plan's pin is the planner's to ask for again."""
        gone = self.pool.take_damaged()
        for brought in _brought(entry for entry in gone if entry.resident):
            self._tally.left(brought)
        return [EvictAdapter(entry.adapter.version, entry.slot) for entry in gone]

    def _cancel_unwanted(self, requested: list[AdapterRef], now: float) -> list[Instruction]:
        if not self.pool.loading:
            return []
        wanted = {adapter.version for adapter in requested}.union(self._plan.wanted, self._guesses.versions())
        unwanted = self.pool.cancel(wanted)
        for version in unwanted:
            self._story.tell(version, now, "nobody wants it any more: its load is cancelled")
        return [CancelLoad(version) for version in unwanted]

    def _waits_in_vain(self, adapter: AdapterRef, idle: bool) -> bool:
        """Also under load: pins of the epoch before go only after this one is answered."""
        idle = idle and self.pool.loading == 0 and not self.pool.leases
        return idle or not self.pool.room_beside_plan(adapter)

    def _load_requested(self, requested: list[AdapterRef], look: "_Look") -> bool:
        """False where not all were looked at, as no more may load; so of the next two."""
        for adapter in requested:
            # Where one found no room none of its size will, as ``keep`` only grows: a long queue costs few looks.
            if adapter.version not in self.pool and adapter.slab_bytes < look.no_room_bytes:
                if self.pool.loading >= self._max_loads:
                    return False
                if not (self._load(adapter, look) or self._load(adapter, look, drop_plan_pins=True)):
                    look.no_room_bytes = adapter.slab_bytes
                    look.awaited |= self.pool.leased_in_the_way(adapter, look.keep, drop_plan_pins=True)
            look.keep.add(adapter.version)
        return True

    def _load_expected(self, look: "_Look") -> bool:
        for adapter in self._guesses.of(Kind.ADMISSION):
            if adapter.version not in self.pool:
                if self.pool.loading >= self._max_loads:
                    return False
                self._load_guess(adapter, Kind.ADMISSION, look)
        return True

    def _load_planned(self, idle: bool, look: "_Look") -> bool:
        # Room that comes for one comes for all that are no larger: they need no look either.
        room_to_come_bytes = 0
        for adapter in list(self._plan.wanted.values()):
            if adapter.version not in self.pool:
                if self.pool.loading >= self._max_loads or not self._pace.allows(look.now, look.stepping):
                    return False
                if adapter.slab_bytes < look.no_room_bytes and self._load(adapter, look, kind=Kind.PLAN):
                    self._pace.began(adapter.version, look.now)
                    continue
                look.no_room_bytes = min(look.no_room_bytes, adapter.slab_bytes)
                if adapter.slab_bytes <= room_to_come_bytes:
                    continue
                if self._waits_in_vain(adapter, idle):
                    self._plan.fail(adapter.version, "no room beside what the plan pins; raise engine.pool_bytes")
                else:
                    room_to_come_bytes = adapter.slab_bytes
                    look.awaited |= self.pool.leased_in_the_way(adapter, look.keep)
        return True

    def _load_usual(self, look: "_Look") -> None:
        """One place is left for whoever comes next."""
        for adapter in self._guesses.of(Kind.PATTERN):
            if self.pool.loading < self._max_loads - 1 and adapter.version not in self.pool:
                self._load_guess(adapter, Kind.PATTERN, look)

    def _load_guess(self, adapter: AdapterRef, kind: Kind, look: "_Look") -> None:
        """Into room that nobody waits for: free, or of what has not been used for a while."""
        if look.no_room_bytes < inf:
            return
        lately_s = look.now - SPARES_S[kind]
        lately = {entry.adapter.version for entry in self.pool.entries() if entry.used_s > lately_s}
        self._load(adapter, look, lately | look.keep, kind=kind)

    def _load(
        self,
        adapter: AdapterRef,
        look: "_Look",
        keep: set[str] | None = None,
        drop_plan_pins: bool = False,
        kind: Kind | None = None,
    ) -> bool:
        """``kind``: None where a request waits for it."""
        now = look.now
        placed = self.pool.place(adapter, now, look.keep if keep is None else keep, drop_plan_pins)
        if placed is None:
            return False
        for entry in placed.evicted:
            self._story.tell(entry.adapter.version, now, f"evicted for {adapter.name}")
            look.instructions.append(_evict(entry))
        for brought in _brought(placed.evicted):
            self._tally.left(brought)
        entry_of_it = self.pool.get(adapter.version)
        assert entry_of_it is not None, "it was placed"
        entry_of_it.prefetch = kind or ""
        why = f" for {kind}" if kind else ""
        self._story.tell(adapter.version, now, f"loading into slot {placed.slot} at {placed.offset_bytes}{why}")
        look.instructions.append(LoadAdapter(adapter, placed.slot, placed.offset_bytes))
        return True


def _brought(entries: Iterable[Entry]) -> Iterator[Brought]:
    """Those of them that no request waited for when their loads began."""
    return (Brought(Kind(e.prefetch), e.adapter.slab_bytes, e.ran) for e in entries if e.prefetch)


def _never_was(gone: Entry | None) -> list[Instruction]:
    """Of an adapter that was not all there, if it is gone."""
    return [EvictAdapter(gone.adapter.version, gone.slot)] if gone is not None else []


def _evict(entry: Entry) -> EvictAdapter:
    """Only what is resident is evicted for others."""
    return EvictAdapter(entry.adapter.version, entry.slot, LeftSlab(entry.adapter, entry.offset_bytes))
