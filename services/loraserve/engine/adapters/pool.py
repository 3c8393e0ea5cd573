"""The adapter pool: allocates extents and slots to adapters and chooses the adapters to evict.

`ExtentAllocator` divides one region of memory into extents, which are contiguous ranges of whole granules. An
allocation takes the low end of the smallest hole that is large enough (best fit). In a simulation with slabs of 40 to
640 MiB in 16.7 GB, 99% of the region was in use at each eviction. Choosing other holes, or placing large and small
extents at opposite ends, was no better.

`EvictionPolicy` chooses the adapters to evict when another adapter needs a slot or memory. A victim set is minimal:
evicting the whole set is enough, evicting fewer adapters is not. If only a slot is missing, each
evictable adapter is a victim set. If memory is missing, a victim set is a run of adjacent extents. The cheapest set is
evicted: fewest plan pins, then the set whose most recent use is oldest, then fewest bytes, then lowest offset.

An adapter is not evicted while it loads, while a request runs with it, or while a peer holds a lease on its extent. An
adapter pinned by a plan may be evicted for a waiting request, but not for a prefetch or another adapter of the plan.
"""

from bisect import bisect
from collections import deque
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from heapq import nsmallest
from itertools import pairwise

import msgspec

from loraserve.cost import MIN_EXTENT_BYTES, extent_bytes, largest_extent_bytes
from loraserve.engine.adapters.lifecycle import (
    LEAVING_STATES,
    LifecycleEvent,
    LifecycleState,
    PoolEntry,
    next_state,
)
from loraserve.messages import AdapterRef


class ExtentAllocator:
    """Allocates extents in a memory region. Their sizes are multiples of ``min_extent_bytes``, the granule."""

    def __init__(self, region_bytes: int, min_extent_bytes: int = MIN_EXTENT_BYTES) -> None:
        self._granule_bytes = min_extent_bytes
        self._region_bytes = largest_extent_bytes(region_bytes, min_extent_bytes)
        self._used: dict[int, int] = {}
        """The size in bytes of each allocated extent, by its start."""
        self._holes = [(0, self._region_bytes)] if self._region_bytes > 0 else []
        """The (start, end) of each hole, sorted."""

    def extent_bytes(self, wanted_bytes: int) -> int:
        return extent_bytes(wanted_bytes, self._granule_bytes)

    @property
    def largest_bytes(self) -> int:
        """The size in bytes of the largest extent that fits into the empty region."""
        return self._region_bytes

    @property
    def free_bytes(self) -> int:
        """The total size of all holes in bytes. The largest hole may be smaller."""
        return sum(end - start for start, end in self._holes)

    def fits(self, wanted_bytes: int) -> bool:
        wanted = self.extent_bytes(wanted_bytes)
        return any(end - start >= wanted for start, end in self._holes)

    def allocate(self, wanted_bytes: int) -> int | None:
        """Return the offset of a new extent in the smallest hole that is large enough; None if there is none."""
        wanted = self.extent_bytes(wanted_bytes)
        fitting = [(end - start, index) for index, (start, end) in enumerate(self._holes) if end - start >= wanted]
        if not fitting:
            return None
        _, index = min(fitting)
        start, end = self._holes.pop(index)
        if start + wanted < end:
            self._holes.insert(index, (start + wanted, end))
        self._used[start] = wanted
        return start

    def release(self, start: int) -> None:
        end = start + self._used.pop(start)
        index = bisect(self._holes, (start, end))
        if index < len(self._holes) and self._holes[index][0] == end:
            _, end = self._holes.pop(index)
        if index > 0 and self._holes[index - 1][1] == start:
            index -= 1
            start, _ = self._holes.pop(index)
        self._holes.insert(index, (start, end))

    def runs(self, wanted_bytes: int, removable: Container[int]) -> Iterator[list[int]]:
        """Yield the minimal runs of neighbouring ``removable`` extents whose release makes a large enough hole.

        A run is a list of start offsets. Holes may lie between its extents. A run is minimal: releasing all but one
        of its extents is not enough. Runs are in address order. Call this only while no hole is large enough.
        """
        wanted = self.extent_bytes(wanted_bytes)
        run: deque[int] = deque()
        room_start = 0
        for start, next_start in pairwise([*sorted(self._used), self._region_bytes]):
            if start not in removable:
                run.clear()
                room_start = self._end(start)
                continue
            run.append(start)
            while next_start - self._end(run[0]) >= wanted:
                room_start = self._end(run.popleft())
            if next_start - room_start >= wanted > start - room_start:
                yield list(run)

    def largest_hole_without(self, removable: Container[int]) -> int:
        """Return the size in bytes of the largest hole after all extents in ``removable`` are released."""
        largest = room_start = 0
        for start in (*sorted(self._used), self._region_bytes):
            if start in removable:
                continue
            largest = max(largest, start - room_start)
            room_start = start + self._used.get(start, 0)
        return largest

    def used_in(self, start: int, end: int) -> list[int]:
        return [used for used, size in self._used.items() if used < end and used + size > start]

    def validate(self) -> None:
        """Raise AssertionError unless extents and merged holes cover the whole region without overlap."""
        spans = sorted([*self._holes, *((start, self._end(start)) for start in self._used)])
        position = 0
        for start, end in spans:
            assert start == position, f"gap or overlap at {position}"
            assert end > start, f"the extent at {start} is empty"
            assert end % self._granule_bytes == 0, f"{end} is not a multiple of the granule"
            position = end
        assert position == self._region_bytes, "the end of the region is missing"
        assert self._holes == sorted(self._holes), "holes are out of order"
        for (_, end), (start, _) in pairwise(self._holes):
            assert end < start, f"the holes that meet at {start} are not merged"

    def _end(self, start: int) -> int:
        return start + self._used[start]


_Cost = tuple[int, float, int, int]


class EvictionPolicy:
    """Chooses the adapters to evict. It reads the pool's ``entries``, ``extents`` and ``free_slots``."""

    def __init__(self, entries: Mapping[str, PoolEntry], extents: ExtentAllocator, free_slots: Sequence[int]) -> None:
        self._entries = entries
        self._extents = extents
        self._free_slots = free_slots

    @property
    def free_bytes(self) -> int:
        """Total bytes that are free or held by evictable adapters. They need not be contiguous."""
        return self._extents.free_bytes + sum(
            self._extents.extent_bytes(e.adapter.slab_bytes) for e in self._entries.values() if e.evictable
        )

    @property
    def room_bytes(self) -> int:
        """Size in bytes of the largest extent after evicting all adapters that no load, request or lease uses."""
        idle = {e.offset_bytes for e in self._entries.values() if e.is_complete and not e.running and not e.leases}
        return self._extents.largest_hole_without(idle) if idle or self._free_slots else 0

    def find_victims(
        self, adapter: AdapterRef, keep: Collection[str] = (), drop_plan_pins: bool = False
    ) -> list[PoolEntry] | None:
        """Return the entries to evict for ``adapter``; [] if it fits already, None if evictions are not enough.

        Versions in ``keep`` are not evicted. Adapters pinned by the plan are evicted only if ``drop_plan_pins``.
        """
        idle = self._idle(keep, drop_plan_pins)
        return self._cheapest(adapter.slab_bytes, [entry for entry in idle if not entry.leases])

    def find_leased_victims(
        self, adapter: AdapterRef, keep: Collection[str] = (), drop_plan_pins: bool = False
    ) -> frozenset[str]:
        """Return the versions whose leases must end so that ``adapter`` fits. Empty if it would still not fit."""
        if not any(entry.leases for entry in self._entries.values()):
            return frozenset()
        victims = self._cheapest(adapter.slab_bytes, self._idle(keep, drop_plan_pins))
        return frozenset(victim.adapter.version for victim in victims or () if victim.leases)

    def fits_beside_plan(self, adapter: AdapterRef) -> bool:
        """Return whether ``adapter`` would fit if every adapter without a plan pin were evicted."""
        others = [entry for entry in self._entries.values() if not entry.planned]
        return self._cheapest(adapter.slab_bytes, others) is not None

    def find_blockers(self, adapter: AdapterRef, places: int) -> frozenset[str]:
        """Return the versions to evict for ``adapter``, including versions with running requests.

        Of the minimal sets whose eviction is enough, takes the ``places`` sets with the fewest running requests. The
        result is empty if evicting adapters without running requests and leases is enough.
        """
        if self._extents.extent_bytes(adapter.slab_bytes) <= self.room_bytes:
            return frozenset()
        choices = self._choices(adapter.slab_bytes, list(self._entries.values()))
        cheapest = nsmallest(places, choices, key=_cost_in_requests)
        return frozenset(entry.adapter.version for choice in cheapest for entry in choice)

    def _idle(self, keep: Collection[str], drop_plan_pins: bool) -> list[PoolEntry]:
        """Return the entries that may be evicted once they have no leases. For the parameters, see `find_victims`."""
        return [
            entry
            for version, entry in self._entries.items()
            if version not in keep and entry.is_complete and not entry.running and (drop_plan_pins or not entry.planned)
        ]

    def _cheapest(self, wanted_bytes: int, removable: list[PoolEntry]) -> list[PoolEntry] | None:
        if self._free_slots and self._extents.fits(wanted_bytes):
            return []
        return min(self._choices(wanted_bytes, removable), key=_cost, default=None)

    def _choices(self, wanted_bytes: int, removable: list[PoolEntry]) -> Iterator[list[PoolEntry]]:
        """Yield each minimal set of ``removable`` entries whose eviction frees a slot and ``wanted_bytes``."""
        if self._extents.fits(wanted_bytes):
            yield from ([entry] for entry in removable)
            return
        by_offset = {entry.offset_bytes: entry for entry in removable}
        for run in self._extents.runs(wanted_bytes, by_offset):
            yield [by_offset[start] for start in run]


def describe_eviction(victim: PoolEntry, victims: int, adapter: AdapterRef, now: float) -> str:
    """Return the logged reason for evicting ``victim``. ``victims`` is the number of adapters evicted together."""
    unused = f"unused for {now - victim.used_s:.1f} s"
    together = f" in a group of {victims}" if victims > 1 else ""
    if victim.planned:
        why = f"a request waits and only adapters that the plan pins could make room ({unused})"
    elif victims > 1:
        why = f"in the group that is cheapest to evict: fewest plan pins, then longest unused ({unused})"
    else:
        why = f"least recently used of what could make room ({unused})"
    return f"evicted for {adapter.name}{together}: {why}"


def _cost(victims: Sequence[PoolEntry]) -> _Cost:
    """Return a sort key for sets to evict: (plan pins, most recent use, bytes, offset)."""
    return (
        sum(victim.planned for victim in victims),
        max(victim.used_s for victim in victims),
        sum(victim.adapter.slab_bytes for victim in victims),
        victims[0].offset_bytes,
    )


def _cost_in_requests(victims: Sequence[PoolEntry]) -> _Cost:
    """Return a sort key for sets to evict: (running requests, plan pins, bytes, offset).

    Unlike `_cost`, it omits the most recent use, which changes whenever a request ends.
    """
    planned, _, slab_bytes, offset_bytes = _cost(victims)
    return sum(victim.running for victim in victims), planned, slab_bytes, offset_bytes


class Placed(msgspec.Struct, frozen=True):
    slot: int
    offset_bytes: int
    evicted: tuple[PoolEntry, ...]


class AdapterPool:
    """Records which adapters are in the engine's pool. Other adapter versions have the state ABSENT.

    ``leases_to_end`` holds the versions whose leases keep another adapter from being placed. They get no new leases.
    """

    def __init__(
        self, pool_bytes: int, slots: int, min_extent_bytes: int = MIN_EXTENT_BYTES, max_rank: int | None = None
    ) -> None:
        self._extents = ExtentAllocator(pool_bytes, min_extent_bytes)
        self._pool_bytes = pool_bytes
        self._slots = slots
        self._max_rank = max_rank
        self._free_slots = list(range(slots - 1, -1, -1))
        self._entries: dict[str, PoolEntry] = {}
        self._placements = 0
        self.eviction = EvictionPolicy(self._entries, self._extents, self._free_slots)
        self.leases = 0
        self.leases_to_end: frozenset[str] = frozenset()

    def __contains__(self, version: object) -> bool:
        return version in self._entries

    def get(self, version: str) -> PoolEntry | None:
        return self._entries.get(version)

    def entries(self) -> Iterable[PoolEntry]:
        return self._entries.values()

    def state(self, version: str) -> LifecycleState:
        entry = self._entries.get(version)
        return entry.state if entry is not None else LifecycleState.ABSENT

    @property
    def not_lendable(self) -> frozenset[str]:
        """The versions that get no new leases: those in ``leases_to_end`` and those that are damaged or failed."""
        leaving = (version for version, entry in self._entries.items() if entry.state in LEAVING_STATES)
        return self.leases_to_end.union(leaving)

    @property
    def loading(self) -> int:
        return sum(entry.is_loading for entry in self._entries.values())

    def refusal(self, adapter: AdapterRef) -> str | None:
        """Return why this pool can never hold ``adapter``, with the remedy; None if it can."""
        if self._slots == 0:
            return "engine.max_adapters is 0; raise it to serve adapters"
        if adapter.slab_bytes < 1:
            return f"adapter {adapter.name} has {adapter.slab_bytes} bytes; register it again"
        if self._max_rank is not None and adapter.rank > self._max_rank:
            return f"adapter {adapter.name} has rank {adapter.rank}, engine.max_rank is {self._max_rank}; raise it"
        if self._extents.extent_bytes(adapter.slab_bytes) > self._extents.largest_bytes:
            needed = self._extents.extent_bytes(adapter.slab_bytes)
            return (
                f"adapter {adapter.name} needs an extent of {needed} bytes, the largest that engine.pool_bytes="
                f"{self._pool_bytes} can give is {self._extents.largest_bytes}; raise engine.pool_bytes "
                "(on a GPU engine.pool_fraction)"
            )
        return None

    def place(
        self, adapter: AdapterRef, now: float, keep: Collection[str] = (), drop_plan_pins: bool = False
    ) -> Placed | None:
        """Give an absent adapter a slot and an extent, evicting others if needed.

        For ``keep`` and ``drop_plan_pins``, see `EvictionPolicy.find_victims`. If evictions are not enough, returns
        None and evicts nothing.
        """
        victims = self.eviction.find_victims(adapter, keep, drop_plan_pins)
        if victims is None:
            return None
        for victim in victims:
            self._remove(victim, LifecycleEvent.EVICTED)
        offset = self._extents.allocate(adapter.slab_bytes)
        assert offset is not None, "victims did not make the room they were chosen for"
        slot = self._free_slots.pop()
        self._placements += 1
        state = next_state(LifecycleState.ABSENT, LifecycleEvent.PLACED)
        self._entries[adapter.version] = PoolEntry(
            adapter, slot, offset, self._placements, state, placed_s=now, used_s=now
        )
        return Placed(slot, offset, tuple(victims))

    def apply(self, version: str, event: LifecycleEvent) -> PoolEntry:
        """Apply an event to the adapter's state and return its entry. The event must not free the extent."""
        entry = self._entries[version]
        entry.apply(event)
        return entry

    def remove_leaving(self) -> list[PoolEntry]:
        """Remove the damaged and failed adapters without running requests or leases. Return their entries."""
        leaving = (entry for _, entry in sorted(self._entries.items()) if entry.state in LEAVING_STATES)
        removed = [entry for entry in leaving if not entry.running and not entry.leases]
        for entry in removed:
            self._remove(entry, LifecycleEvent.RELEASED)
        return removed

    def start_running(self, version: str, now: float) -> int:
        entry = self._entries[version]
        entry.running += 1
        entry.ran = True
        entry.used_s = now
        return entry.slot

    def stop_running(self, version: str, now: float) -> None:
        entry = self._entries[version]
        entry.running -= 1
        entry.used_s = now

    def lease(self, version: str) -> PoolEntry:
        entry = self._entries[version]
        assert entry.is_complete, f"{version} was leased before it is loaded"
        entry.leases += 1
        self.leases += 1
        return entry

    def end_lease(self, version: str, generation: int) -> None:
        entry = self._entries[version]
        assert entry.generation == generation, f"{version} left while it was leased"
        entry.leases -= 1
        self.leases -= 1

    def pin_for_plan(self, version: str, epoch: int | None) -> bool:
        """Pin the adapter for the plan of ``epoch``; None unpins it. Return whether it became pinned or unpinned."""
        entry = self._entries.get(version)
        if entry is None:
            return False
        changed = entry.planned != (epoch is not None)
        entry.plan_epoch = epoch
        return changed

    def validate(self) -> None:
        """Raise AssertionError if an invariant of the extents, slots, states or users is broken."""
        self._extents.validate()
        slots = [entry.slot for entry in self._entries.values()] + self._free_slots
        assert sorted(slots) == list(range(self._slots)), "a slot is lost or given out twice"
        for version, entry in self._entries.items():
            assert entry.adapter.version == version, version
            entry.validate()
            used = self._extents.used_in(entry.offset_bytes, entry.offset_bytes + entry.adapter.slab_bytes)
            assert used == [entry.offset_bytes], f"{version} shares its extent"
        assert self.leases == sum(entry.leases for entry in self._entries.values()), "the leases are counted wrong"

    def _remove(self, entry: PoolEntry, event: LifecycleEvent) -> None:
        """Free the adapter's slot and extent after ``event``. ``entry.state`` keeps the state before the event."""
        assert next_state(entry.state, event) is LifecycleState.ABSENT, event
        assert not entry.leases, f"{entry.adapter.version} left while it was leased"
        self._extents.release(entry.offset_bytes)
        self._free_slots.append(entry.slot)
        del self._entries[entry.adapter.version]
