"""Which adapters are being brought in, for whom, in which order. Pure.

Requests come before the plan, a few loads run at once, and a load that fails is told to everyone who waits for it.
"""

from collections.abc import Iterable
from math import inf

from loraserve.engine.events import (
    CopiesRetired,
    EvictAdapter,
    Instruction,
    LeasesEnded,
    LoadAdapter,
    PlanPrepared,
    PlanReady,
)
from loraserve.engine.limits import SchedulerLimits
from loraserve.engine.pool import AdapterPool
from loraserve.engine.story import Story
from loraserve.messages import AdapterRef


class Residency:
    """The pool, its loads and the plan's wishes."""

    def __init__(self, limits: SchedulerLimits, story: Story) -> None:
        self.pool = AdapterPool(limits.pool_bytes, limits.max_adapters, max_rank=limits.max_rank)
        self._max_loads = limits.max_loads
        self._story = story
        self.plan_epoch = 0
        """The newest plan that was heard of, 0 before the first."""
        self._epoch: int | None = None
        self._wanted: dict[str, AdapterRef] = {}
        self._failed: dict[str, str] = {}

    def ready(self, version: str) -> bool:
        """The base model always is."""
        entry = self.pool.get(version)
        return version == "" or (entry is not None and entry.resident)

    def handle(self, event: PlanPrepared | CopiesRetired | LeasesEnded) -> list[Instruction]:
        match event:
            case PlanPrepared(epoch, adapters):
                return self.prepare(epoch, adapters)
            case CopiesRetired(epoch, keep):
                return self.retire(epoch, keep)
            case LeasesEnded():
                return []

    def prepare(self, epoch: int, adapters: tuple[AdapterRef, ...]) -> list[Instruction]:
        """The plan wants these; a plan that was still being prepared is given up.

        What a planner asked for before it died may come after what its successor asked for: it is refused.
        """
        if epoch < self.plan_epoch:
            late = f"epoch {epoch} is older than epoch {self.plan_epoch}, which was asked for here already"
            return [PlanReady(epoch, dict.fromkeys((a.version for a in adapters), late))]
        ended = self._end_plan("a newer plan came") if self._epoch is not None else []
        self._epoch = self.plan_epoch = epoch
        self._wanted = {adapter.version: adapter for adapter in adapters}
        self._failed = {}
        for adapter in adapters:
            refusal = self.pool.refusal(adapter)
            if refusal is not None:
                self._fail(adapter.version, refusal)
            elif self.ready(adapter.version):
                self._settle(adapter.version)
        return [*ended, *self._plan_done()]

    def retire(self, epoch: int, keep: tuple[str, ...]) -> list[Instruction]:
        """Nothing that a plan up to ``epoch`` wanted is wanted any more, but ``keep``: pins go, and loads to come.

        Newer plans are not touched. A plan that was prepared and never published goes with the next epoch that is.
        """
        self.plan_epoch = max(self.plan_epoch, epoch)
        kept = set(keep)
        for entry in self.pool.entries():
            if entry.planned_epoch <= epoch and entry.adapter.version not in kept:
                self.pool.plan(entry.adapter.version, False)
        if self._epoch is not None and self._epoch <= epoch:
            for version in self._wanted.keys() - kept:
                self._fail(version, f"epoch {epoch} does without it")
        return self._plan_done()

    def loaded(self, version: str) -> list[Instruction]:
        self.pool.loaded(version)
        if version in self._wanted:
            self._settle(version)
        return self._plan_done()

    def load_failed(self, version: str, message: str) -> list[Instruction]:
        entry = self.pool.load_failed(version)
        self._fail(version, message)
        return [EvictAdapter(version, entry.slot), *self._plan_done()]

    def start_loads(self, requested: Iterable[AdapterRef], now: float, idle: bool) -> list[Instruction]:
        """Begin what there is room for: first what requests wait for, then the plan's.

        ``requested`` is in order of arrival: nobody's adapter leaves for that of a later request, or two requests could
        take turns in loading and neither would run. ``idle`` says that no request is left, so that room which is
        missing now will not come by waiting.
        """
        instructions: list[Instruction] = []
        keep: set[str] = set()
        awaited: frozenset[str] = frozenset()
        no_room_bytes = inf
        for adapter in requested:
            # Where one found no room none of its size will, as ``keep`` only grows: a long queue costs few looks.
            if adapter.version not in self.pool and adapter.slab_bytes < no_room_bytes:
                if self.pool.loading >= self._max_loads:
                    return self._await_also(awaited, instructions)
                begun = self._load(adapter, now, keep, drop_plan_pins=False)
                begun = begun or self._load(adapter, now, keep, drop_plan_pins=True)
                instructions += begun
                if not begun:
                    no_room_bytes = adapter.slab_bytes
                    awaited |= self.pool.leased_in_the_way(adapter, keep, drop_plan_pins=True)
            keep.add(adapter.version)
        # Room that comes for one comes for all that are no larger: they need no look either.
        room_to_come_bytes = 0
        for adapter in list(self._wanted.values()):
            if adapter.version not in self.pool:
                if self.pool.loading >= self._max_loads:
                    return self._await_also(awaited, instructions)
                fits = adapter.slab_bytes < no_room_bytes
                begun = self._load(adapter, now, keep, drop_plan_pins=False) if fits else []
                instructions += begun
                no_room_bytes = no_room_bytes if begun else min(no_room_bytes, adapter.slab_bytes)
                if begun or adapter.slab_bytes <= room_to_come_bytes:
                    continue
                if self._waits_in_vain(adapter, idle):
                    self._fail(adapter.version, "no room beside what the plan pins; raise engine.pool_bytes")
                else:
                    room_to_come_bytes = adapter.slab_bytes
                    awaited |= self.pool.leased_in_the_way(adapter, keep)
        self.pool.awaited = awaited
        return [*instructions, *self._plan_done()]

    def in_the_way(self, adapter: AdapterRef | None, places: int) -> frozenset[str]:
        """What has to leave for an adapter that waits for room; see AdapterPool."""
        if adapter is None or adapter.version in self.pool:
            return frozenset()
        return self.pool.in_the_way(adapter, places)

    def _waits_in_vain(self, adapter: AdapterRef, idle: bool) -> bool:
        """Also under load: pins of the epoch before go only after this one is answered."""
        idle = idle and self.pool.loading == 0 and not self.pool.leases
        return idle or not self.pool.room_beside_plan(adapter)

    def _await_also(self, awaited: frozenset[str], instructions: list[Instruction]) -> list[Instruction]:
        """Not all were looked at: what was awaited for the others still is, or readers could take turns for ever."""
        self.pool.awaited |= awaited
        return instructions

    def _load(self, adapter: AdapterRef, now: float, keep: set[str], drop_plan_pins: bool) -> list[Instruction]:
        placed = self.pool.place(adapter, now, keep, drop_plan_pins)
        if placed is None:
            return []
        for entry in placed.evicted:
            self._story.tell(entry.adapter.version, now, f"evicted for {adapter.name}")
        self._story.tell(adapter.version, now, f"loading into slot {placed.slot} at {placed.offset_bytes}")
        evictions = [EvictAdapter(entry.adapter.version, entry.slot) for entry in placed.evicted]
        return [*evictions, LoadAdapter(adapter, placed.slot, placed.offset_bytes)]

    def _settle(self, version: str) -> None:
        assert self._epoch is not None, "nothing is wanted but by a plan that is being prepared"
        self.pool.plan(version, True, self._epoch)
        self._wanted.pop(version, None)

    def _fail(self, version: str, message: str) -> None:
        if self._wanted.pop(version, None) is not None:
            self._failed[version] = message

    def _plan_done(self) -> list[Instruction]:
        if self._epoch is None or self._wanted:
            return []
        done = PlanReady(self._epoch, self._failed)
        self._epoch, self._failed = None, {}
        return [done]

    def _end_plan(self, reason: str) -> list[Instruction]:
        for version in list(self._wanted):
            self._fail(version, reason)
        return self._plan_done()
