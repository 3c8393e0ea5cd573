"""Decides which adapters to load, in which order, and which loads to cancel.

Waiting requests have priority over the plan. Prefetch candidates never evict an adapter that a request or the plan
needs. At most ``max_loads`` loads run at once. The planner gets `PlanReady` when each adapter of its plan is
resident or has failed.
"""

from collections.abc import Collection, Iterable, Iterator
from math import inf

import msgspec

from loraserve.engine.adapters.lifecycle import (
    WANTED_LOADS,
    LifecycleEvent,
    LifecycleState,
    LoadedSlab,
    PoolEntry,
)
from loraserve.engine.adapters.pool import AdapterPool, describe_eviction
from loraserve.engine.adapters.prefetch import (
    SPARES_S,
    PrefetchCandidates,
    PrefetchedAdapter,
    PrefetchKind,
    PrefetchTally,
)
from loraserve.engine.schedule.events import (
    AdapterExpected,
    CancelLoad,
    CopiesRequested,
    CopiesRetired,
    EvictAdapter,
    Instruction,
    LeasesEnded,
    LeftSlab,
    LoadAdapter,
    PlanReady,
    SchedulerLimits,
)
from loraserve.messages import AdapterRef, PrefetchCounts
from loraserve.story import Story

REST_FACTOR = 7.0
"""After each load of the plan, its loads pause for this multiple of the load's duration."""
LONGEST_REST_S = 0.2
"""Maximum pause after a load of the plan. The cost to steps is partly constant per load, so a longer pause for large
slabs is useless."""


class PlannedLoads:
    """The adapters of the plan being prepared that are not resident yet (``missing``) or have failed.

    One plan is prepared at a time. Its answer is `PlanReady`, given when no adapter is missing any more.
    """

    def __init__(self, pool: AdapterPool) -> None:
        self._pool = pool
        self.newest_epoch = 0
        """The epoch of the newest plan known to this engine; 0 before the first."""
        self._epoch: int | None = None
        self.missing: dict[str, AdapterRef] = {}
        self._failed: dict[str, str] = {}

    def begin(self, epoch: int, adapters: Collection[AdapterRef]) -> list[Instruction]:
        """Start to prepare a plan. Return the PlanReady of an unfinished earlier plan, whose missing adapters fail."""
        for version in list(self.missing):
            self.fail(version, "a newer plan came")
        answers = self.take_answer()
        self._epoch = self.newest_epoch = epoch
        self.missing = {adapter.version: adapter for adapter in adapters}
        self._failed = {}
        return answers

    def retire(self, epoch: int, kept: Collection[str]) -> None:
        """Fail the missing adapters that are not in ``kept``, if the plan being prepared is of ``epoch`` or older."""
        self.newest_epoch = max(self.newest_epoch, epoch)
        if self._epoch is not None and self._epoch <= epoch:
            for version in self.missing.keys() - kept:
                self.fail(version, f"epoch {epoch} does not include it")

    def pin_loaded(self, version: str) -> None:
        if self.missing.pop(version, None) is not None:
            assert self._epoch is not None, "an adapter is missing for no plan"
            self._pool.pin_for_plan(version, self._epoch)

    def fail(self, version: str, message: str) -> None:
        if self.missing.pop(version, None) is not None:
            self._failed[version] = message

    def take_answer(self) -> list[Instruction]:
        """Return [PlanReady] the first time that no adapter of the plan is missing, else []."""
        if self._epoch is None or self.missing:
            return []
        answer = PlanReady(self._epoch, self._failed)
        self._epoch, self._failed = None, {}
        return [answer]


class LoadPace:
    """Limits the loads of a plan while steps run: one load at a time, and a pause after each.

    Loads slow down concurrent steps. If steps run on the CPU, a load costs them about 3 ms for its messages, copy and
    digests (SmolLM2-135M, 2 cores). Unlimited loads of 13 MB made the median step 35% longer. A plan can wait, so its
    loads are limited. Loads for waiting requests are not.
    """

    def __init__(self) -> None:
        self._loads: list[PoolEntry] = []
        self._rests_until_s = 0.0

    def begin(self, entry: PoolEntry) -> None:
        self._loads.append(entry)

    def update(self, now: float) -> None:
        """Start a pause for each load that has ended."""
        for entry in self._loads:
            if not entry.is_loading:
                self._rests_until_s = now + min(LONGEST_REST_S, REST_FACTOR * (now - entry.placed_s))
        self._loads = [entry for entry in self._loads if entry.is_loading]

    def allows(self, now: float, stepping: bool) -> bool:
        return not stepping or (not self._loads and now >= self._rests_until_s)


class LoadPass(msgspec.Struct):
    """The state of one pass over the adapters that wait to be loaded.

    Versions in ``keep`` are not evicted. Adapters of ``no_room_bytes`` or more do not fit. The leases on
    ``leases_to_end`` must end before an adapter that does not fit can be placed.
    """

    now: float
    stepping: bool
    instructions: list[Instruction]
    keep: set[str] = msgspec.field(default_factory=set)
    no_room_bytes: float = inf
    leases_to_end: frozenset[str] = frozenset()


class Residency:
    def __init__(self, limits: SchedulerLimits, story: Story) -> None:
        self.pool = AdapterPool(limits.pool_bytes, limits.max_adapters, max_rank=limits.max_rank)
        self._max_loads = limits.max_loads
        self.story = story
        self._plan = PlannedLoads(self.pool)
        self._candidates = PrefetchCandidates()
        self._tally = PrefetchTally()
        self._pace = LoadPace()

    @property
    def plan_epoch(self) -> int:
        return self._plan.newest_epoch

    def is_ready(self, version: str) -> bool:
        """Return whether the adapter is resident. The base model ("") is always ready."""
        return version == "" or self.pool.state(version) is LifecycleState.RESIDENT

    def handle(
        self, event: CopiesRequested | CopiesRetired | LeasesEnded | AdapterExpected, now: float
    ) -> list[Instruction]:
        match event:
            case CopiesRequested(epoch, adapters):
                return self.prepare_plan(epoch, adapters)
            case CopiesRetired(epoch, keep):
                return self.retire_copies(epoch, keep)
            case AdapterExpected(adapter):
                self._expect(adapter, PrefetchKind.ADMISSION, now)
                return []
            case LeasesEnded():
                return []

    def note_request(self, adapter: AdapterRef, now: float) -> None:
        """Record a request for ``adapter``. The adapters that usually follow it become prefetch candidates."""
        for follower in self._candidates.note_request(adapter, now):
            self._expect(follower, PrefetchKind.PATTERN, now)

    def prepare_plan(self, epoch: int, adapters: tuple[AdapterRef, ...]) -> list[Instruction]:
        """Start to prepare a plan and give up an unfinished earlier one. Return a PlanReady for each completed plan.

        A plan older than the newest one is refused, because its planner has been replaced.
        """
        if epoch < self.plan_epoch:
            late = f"epoch {epoch} is older than epoch {self.plan_epoch}, which this engine already received"
            return [PlanReady(epoch, dict.fromkeys((a.version for a in adapters), late))]
        answers = self._plan.begin(epoch, adapters)
        for adapter in adapters:
            refusal = self.pool.refusal(adapter)
            if refusal is not None:
                self._plan.fail(adapter.version, refusal)
            elif self.is_ready(adapter.version):
                self._plan.pin_loaded(adapter.version)
        return [*answers, *self._plan.take_answer()]

    def retire_copies(self, epoch: int, keep: tuple[str, ...]) -> list[Instruction]:
        """Drop the pins and the missing adapters of all plans up to ``epoch``, except for the versions in ``keep``.

        This also retires earlier plans that were prepared but never published. Newer plans are not changed.
        """
        kept = set(keep)
        for entry in self.pool.entries():
            if entry.plan_epoch is not None and entry.plan_epoch <= epoch and entry.adapter.version not in kept:
                self.pool.pin_for_plan(entry.adapter.version, None)
        self._plan.retire(epoch, kept)
        return self._plan.take_answer()

    def complete_load(self, version: str, read: int = 0, slab: LoadedSlab | None = None) -> list[Instruction]:
        """Make an adapter resident after its load. ``read`` is the number of the verified read; 0 if not announced."""
        entry = self.pool.apply(version, LifecycleEvent.LOADED)
        entry.verified_read, entry.slab = read, slab
        for prefetched in _prefetched([entry]):
            self._tally.count_load(prefetched)
        self._candidates.drop(version)
        self._plan.pin_loaded(version)
        return self._plan.take_answer()

    def fail_load(self, version: str, message: str) -> list[Instruction]:
        """Record a failed load. The adapter is removed as soon as no running request uses it."""
        self.pool.apply(version, LifecycleEvent.LOAD_FAILED)
        self._candidates.drop_failed(version)
        self._plan.fail(version, message)
        return [*self._evict_leaving(), *self._plan.take_answer()]

    def drop_cancelled_load(self, version: str) -> list[Instruction]:
        """Free the extent of a cancelled load. If a request needs the adapter again, another load begins later."""
        self.pool.apply(version, LifecycleEvent.LOAD_FAILED)
        return self._evict_leaving()

    def start_loads(
        self, requested: Iterable[AdapterRef], now: float, idle: bool, stepping: bool = False
    ) -> list[Instruction]:
        """Begin the loads that fit in the pool, and cancel the loads that nothing needs any more.

        The order is: adapters of waiting requests, ADMISSION candidates, the plan, PATTERN candidates. ``requested`` is
        in order of arrival. An adapter of a request is not evicted for a later request. Otherwise two requests could
        evict each other's adapters and neither would run. ``idle`` means that the engine has no requests, so waiting
        for a request to end cannot free memory. ``stepping`` means that steps run, which limits the plan's loads.
        """
        self._pace.update(now)
        requested = list(requested)
        self._candidates.expire(now)
        current = LoadPass(now, stepping, [*self._evict_leaving(), *self._cancel_unwanted(requested, now)])
        # Announced requests soon have priority over the plan anyway. Followers must not delay any other load.
        if (
            self._load_requested(requested, current)
            and self._load_expected(current)
            and self._load_planned(idle, current)
        ):
            self.pool.leases_to_end = current.leases_to_end
            self._load_followers(current)
        else:
            # Keep the earlier ``leases_to_end``: adapters not considered in this pass may still wait for those leases.
            self.pool.leases_to_end |= current.leases_to_end
        return [*current.instructions, *self._plan.take_answer()]

    def find_blockers(self, adapter: AdapterRef | None, places: int) -> frozenset[str]:
        """Return the versions to evict before ``adapter`` can be loaded (see `EvictionPolicy.find_blockers`).

        The result is empty for the base model (None), and for an adapter that is in the pool or is being loaded.
        """
        if adapter is None or adapter.version in self.pool:
            return frozenset()
        return self.pool.eviction.find_blockers(adapter, places)

    def prefetch_counts(self) -> tuple[PrefetchCounts, ...]:
        return self._tally.counts(_prefetched(entry for entry in self.pool.entries() if entry.is_complete))

    def validate(self) -> None:
        self.pool.validate()
        self._candidates.validate()

    def _expect(self, adapter: AdapterRef, kind: PrefetchKind, now: float) -> None:
        if self.is_ready(adapter.version) or self.pool.refusal(adapter) is not None:
            return
        if self._candidates.expect(adapter, kind, now):
            self.story.tell(adapter.version, now, f"expected: {kind}")

    def _evict_leaving(self) -> list[Instruction]:
        """Evict the damaged and failed adapters that nothing uses any more.

        Requests that need such an adapter reload it. The planner asks again for adapters of its plan.
        """
        instructions: list[Instruction] = []
        for entry in self.pool.remove_leaving():
            damaged = entry.state is LifecycleState.DAMAGED
            if damaged:
                self._count_evictions([entry])
            reason = "its slab was damaged in the pool" if damaged else "its load failed or was cancelled"
            instructions.append(EvictAdapter(entry.adapter.version, entry.slot, entry.adapter.name, reason))
        return instructions

    def _cancel_unwanted(self, requested: list[AdapterRef], now: float) -> list[Instruction]:
        if not self.pool.loading:
            return []
        wanted = {adapter.version for adapter in requested}.union(self._plan.missing, self._candidates.versions())
        instructions: list[Instruction] = []
        for entry in self.pool.entries():
            version = entry.adapter.version
            if entry.state in WANTED_LOADS and not entry.running and version not in wanted:
                entry.apply(LifecycleEvent.CANCELLED)
                self.story.tell(version, now, "load cancelled: no request, plan or prefetch wants it any more")
                instructions.append(CancelLoad(version))
        return instructions

    def _load_requested(self, requested: list[AdapterRef], current: LoadPass) -> bool:
        """Load adapters of waiting requests. Return False if ``max_loads`` was reached before all were considered."""
        for adapter in requested:
            # If one adapter does not fit, none of its size or larger will: ``keep`` only grows. This saves searches.
            if adapter.version not in self.pool and adapter.slab_bytes < current.no_room_bytes:
                if self.pool.loading >= self._max_loads:
                    return False
                if not (self._load(adapter, current) or self._load(adapter, current, drop_plan_pins=True)):
                    current.no_room_bytes = adapter.slab_bytes
                    leased = self.pool.eviction.find_leased_victims(adapter, current.keep, drop_plan_pins=True)
                    current.leases_to_end |= leased
            current.keep.add(adapter.version)
        return True

    def _load_expected(self, current: LoadPass) -> bool:
        for adapter in self._candidates.of_kind(PrefetchKind.ADMISSION):
            if adapter.version not in self.pool:
                if self.pool.loading >= self._max_loads:
                    return False
                self._load_candidate(adapter, PrefetchKind.ADMISSION, current)
        return True

    def _load_planned(self, idle: bool, current: LoadPass) -> bool:
        """Load missing adapters of the plan. Return False if a limit on loads was reached before the last one."""
        # If one adapter will fit later, all adapters up to its size will: they need no search.
        room_to_come_bytes = 0
        for adapter in list(self._plan.missing.values()):
            if adapter.version not in self.pool:
                if self.pool.loading >= self._max_loads or not self._pace.allows(current.now, current.stepping):
                    return False
                if adapter.slab_bytes < current.no_room_bytes and self._load(adapter, current, kind=PrefetchKind.PLAN):
                    continue
                current.no_room_bytes = min(current.no_room_bytes, adapter.slab_bytes)
                if adapter.slab_bytes <= room_to_come_bytes:
                    continue
                if self._can_never_fit(adapter, idle):
                    self._plan.fail(adapter.version, "no room beside what the plan pins; raise engine.pool_bytes")
                else:
                    room_to_come_bytes = adapter.slab_bytes
                    current.leases_to_end |= self.pool.eviction.find_leased_victims(adapter, current.keep)
        return True

    def _can_never_fit(self, adapter: AdapterRef, idle: bool) -> bool:
        """Return whether an adapter of the plan cannot be placed before the plan's PlanReady is sent.

        Adapters pinned by the previous plan may fill the pool. They are unpinned only after the PlanReady.
        """
        nothing_ends = idle and self.pool.loading == 0 and not self.pool.leases
        return nothing_ends or not self.pool.eviction.fits_beside_plan(adapter)

    def _load_followers(self, current: LoadPass) -> None:
        """Prefetch adapters that usually follow recent requests. Leaves one load of ``max_loads`` for a request."""
        for adapter in self._candidates.of_kind(PrefetchKind.PATTERN):
            if self.pool.loading < self._max_loads - 1 and adapter.version not in self.pool:
                self._load_candidate(adapter, PrefetchKind.PATTERN, current)

    def _load_candidate(self, adapter: AdapterRef, kind: PrefetchKind, current: LoadPass) -> None:
        """Load a candidate if no adapter waits for space. Evict only adapters unused for ``SPARES_S[kind]`` seconds."""
        if current.no_room_bytes < inf:
            return
        spared_since_s = current.now - SPARES_S[kind]
        spared = {entry.adapter.version for entry in self.pool.entries() if entry.used_s > spared_since_s}
        self._load(adapter, current, keep=spared | current.keep, kind=kind)

    def _load(
        self,
        adapter: AdapterRef,
        current: LoadPass,
        keep: set[str] | None = None,
        drop_plan_pins: bool = False,
        kind: PrefetchKind | None = None,
    ) -> bool:
        """Begin a load if the adapter fits. Return whether it began. ``kind`` is None for the adapter of a request."""
        now = current.now
        placed = self.pool.place(adapter, now, current.keep if keep is None else keep, drop_plan_pins)
        if placed is None:
            return False
        for entry in placed.evicted:
            reason = describe_eviction(entry, len(placed.evicted), adapter, now)
            self.story.tell(entry.adapter.version, now, reason)
            left = LeftSlab(entry.adapter, entry.offset_bytes, entry.slab)
            current.instructions.append(
                EvictAdapter(entry.adapter.version, entry.slot, entry.adapter.name, reason, left)
            )
        self._count_evictions(placed.evicted)
        placed_entry = self.pool.get(adapter.version)
        assert placed_entry is not None, "it was placed"
        placed_entry.prefetch = kind
        if kind is PrefetchKind.PLAN:
            self._pace.begin(placed_entry)
        why = f" for {kind}" if kind else ""
        self.story.tell(adapter.version, now, f"loading into slot {placed.slot} at {placed.offset_bytes}{why}")
        current.instructions.append(LoadAdapter(adapter, placed.slot, placed.offset_bytes))
        return True

    def _count_evictions(self, evicted: Iterable[PoolEntry]) -> None:
        for prefetched in _prefetched(evicted):
            self._tally.count_eviction(prefetched)


def _prefetched(entries: Iterable[PoolEntry]) -> Iterator[PrefetchedAdapter]:
    return (PrefetchedAdapter(e.prefetch, e.adapter.slab_bytes, e.ran) for e in entries if e.prefetch)
