"""The adapters in the pool: their extents, slots, states and users.

An adapter is not evicted while it loads, while a request runs with it, or while a peer holds a lease on its extent. An
adapter pinned by a plan may be evicted for a waiting request, but not for a prefetch or another adapter of the plan.
eviction.py chooses the victims among the others.
"""

from collections.abc import Collection, Iterable

import msgspec

from loraserve.cost import MIN_EXTENT_BYTES
from loraserve.engine.adapters.eviction import EvictionPolicy
from loraserve.engine.adapters.extents import ExtentAllocator
from loraserve.engine.adapters.lifecycle import (
    LEAVING_STATES,
    LifecycleEvent,
    LifecycleState,
    PoolEntry,
    next_state,
)
from loraserve.messages import AdapterRef


class Placed(msgspec.Struct, frozen=True):
    """The slot and the extent of a new adapter, and the entries that were evicted for it."""

    slot: int
    offset_bytes: int
    evicted: tuple[PoolEntry, ...]


class AdapterPool:
    """The engine's adapter memory. Versions that it does not hold are ABSENT.

    ``leases_to_end`` holds the versions whose leases keep another adapter from being placed; they get no new leases.
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
    def awaited(self) -> frozenset[str]:
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

        Versions in ``keep`` are not evicted. Returns None, with nothing evicted, if the adapter cannot be placed.
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
        self._entries[adapter.version] = PoolEntry(adapter, slot, offset, self._placements, state, used_s=now)
        return Placed(slot, offset, tuple(victims))

    def apply(self, version: str, event: LifecycleEvent) -> PoolEntry:
        """Apply an event after which the adapter keeps its extent; return its entry."""
        entry = self._entries[version]
        entry.apply(event)
        return entry

    def remove_leaving(self) -> list[PoolEntry]:
        """Remove the damaged and failed adapters without running requests or leases; return their entries."""
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
        """Count one more lease on the adapter; return its entry."""
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
        """Pin the adapter for the plan of ``epoch``, or unpin it if None. Return whether that pinned or unpinned it."""
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
        """Free the slot and the extent. The entry keeps its last state for the caller."""
        assert next_state(entry.state, event) is LifecycleState.ABSENT, event
        assert not entry.leases, f"{entry.adapter.version} left while it was leased"
        self._extents.release(entry.offset_bytes)
        self._free_slots.append(entry.slot)
        del self._entries[entry.adapter.version]
