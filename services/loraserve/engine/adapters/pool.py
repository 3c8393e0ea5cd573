"""The adapters in the pool: their extents, slots, states and users.

An adapter stays while it loads, while a request runs with it and while a peer has a lease on its extent. A plan's pin
keeps it from leaving for prefetches and for other adapters of the plan, but not for a waiting request. Which of the
others leave when room is wanted is decided in eviction.py.
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

    ``leases_to_end`` are the versions whose leases stand in the way of another adapter: they get no new leases.
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
        """The versions that get no new leases: they have to leave, for room or because they are damaged."""
        leaving = (version for version, entry in self._entries.items() if entry.state in LEAVING_STATES)
        return self.leases_to_end.union(leaving)

    @property
    def loading(self) -> int:
        return sum(entry.is_loading for entry in self._entries.values())

    def refusal(self, adapter: AdapterRef) -> str | None:
        """Return why this adapter can never be held here, with the remedy; None if it can."""
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
        """Give an absent adapter a slot and an extent; return None if no choice of victims makes the room.

        Nothing is evicted in vain, and versions in ``keep`` are not evicted at all.
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
        """Change the state of an adapter that has an extent and keeps it; return its entry."""
        entry = self._entries[version]
        entry.apply(event)
        return entry

    def remove_leaving(self) -> list[PoolEntry]:
        """Remove the damaged adapters and failed loads that nothing uses any more; return their entries."""
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
        """Pin the adapter for one more reader; return the entry that it reads."""
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
        """Set the pin of the plan of an epoch, or drop it if None; return whether that pinned or unpinned something."""
        entry = self._entries.get(version)
        if entry is None:
            return False
        changed = entry.planned != (epoch is not None)
        entry.plan_epoch = epoch
        return changed

    def validate(self) -> None:
        """Raise AssertionError naming the invariant that is broken: extents, slots, states, users."""
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
        """Free the slot and the extent. The entry keeps its last state, which callers may look at."""
        assert next_state(entry.state, event) is LifecycleState.ABSENT, event
        assert not entry.leases, f"{entry.adapter.version} left while it was leased"
        self._extents.release(entry.offset_bytes)
        self._free_slots.append(entry.slot)
        del self._entries[entry.adapter.version]
