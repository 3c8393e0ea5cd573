"""Chooses the adapters to evict from the pool when another adapter needs a slot or memory.

A victim set is minimal: evicting all its adapters makes enough room, evicting fewer does not. If only a slot is
missing, every single adapter is a victim set; if memory is missing, a victim set is a run of adjacent extents. The
cheapest set is evicted: the one with the fewest plan pins, then the one whose most recent use is oldest, then fewest
bytes, then lowest offset. Adapters pinned by a plan are evicted only for waiting requests.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from heapq import nsmallest

from loraserve.engine.adapters.extents import ExtentAllocator
from loraserve.engine.adapters.lifecycle import PoolEntry
from loraserve.messages import AdapterRef

_Cost = tuple[int, float, int, int]


class EvictionPolicy:
    """Chooses the victims. It reads the pool's ``entries``, ``extents`` and ``free_slots`` but changes nothing."""

    def __init__(self, entries: Mapping[str, PoolEntry], extents: ExtentAllocator, free_slots: Sequence[int]) -> None:
        self._entries = entries
        self._extents = extents
        self._free_slots = free_slots

    @property
    def free_bytes(self) -> int:
        """The bytes that are free or held by evictable adapters. They need not be contiguous."""
        return self._extents.free_bytes + sum(
            self._extents.extent_bytes(e.adapter.slab_bytes) for e in self._entries.values() if e.evictable
        )

    @property
    def room_bytes(self) -> int:
        """The largest extent a waiting request can get now by evicting adapters without running requests or leases."""
        idle = {e.offset_bytes for e in self._entries.values() if e.is_complete and not e.running and not e.leases}
        return self._extents.largest_hole_without(idle) if idle or self._free_slots else 0

    def find_victims(
        self, adapter: AdapterRef, keep: Collection[str] = (), drop_plan_pins: bool = False
    ) -> list[PoolEntry] | None:
        """Return the entries to evict for ``adapter``; [] if it fits already, None if no eviction makes room."""
        idle = self._idle(keep, drop_plan_pins)
        return self._cheapest(adapter.slab_bytes, [entry for entry in idle if not entry.leases])

    def find_leased_victims(
        self, adapter: AdapterRef, keep: Collection[str] = (), drop_plan_pins: bool = False
    ) -> frozenset[str]:
        """Return the versions whose leases must end before ``adapter`` fits; empty if ending leases does not help."""
        if not any(entry.leases for entry in self._entries.values()):
            return frozenset()
        victims = self._cheapest(adapter.slab_bytes, self._idle(keep, drop_plan_pins))
        return frozenset(victim.adapter.version for victim in victims or () if victim.leases)

    def fits_beside_plan(self, adapter: AdapterRef) -> bool:
        """Return whether ``adapter`` would fit if every adapter without a plan pin were evicted."""
        others = [entry for entry in self._entries.values() if not entry.planned]
        return self._cheapest(adapter.slab_bytes, others) is not None

    def find_blockers(self, adapter: AdapterRef, places: int) -> frozenset[str]:
        """Return the versions that block ``adapter``: those in the ``places`` victim sets with the fewest requests.

        Only running requests count; leases end by themselves. The result is empty if evicting adapters without running
        requests makes room now.
        """
        if self._extents.extent_bytes(adapter.slab_bytes) <= self.room_bytes:
            return frozenset()
        choices = self._choices(adapter.slab_bytes, list(self._entries.values()))
        cheapest = nsmallest(places, choices, key=_cost_in_requests)
        return frozenset(entry.adapter.version for choice in cheapest for entry in choice)

    def _idle(self, keep: Collection[str], drop_plan_pins: bool) -> list[PoolEntry]:
        """Return the entries that may be evicted as soon as they have no leases."""
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
        """Yield each victim set (see the module docstring) among the ``removable`` entries."""
        if self._extents.fits(wanted_bytes):
            yield from ([entry] for entry in removable)
            return
        by_offset = {entry.offset_bytes: entry for entry in removable}
        for run in self._extents.runs(wanted_bytes, by_offset):
            yield [by_offset[start] for start in run]


def describe_eviction(victim: PoolEntry, victims: int, adapter: AdapterRef, now: float) -> str:
    """Return the eviction reason for logs and stories. ``victims`` is the number of adapters evicted together."""
    unused = f"unused for {now - victim.used_s:.1f} s"
    together = f" together with {victims - 1} others" if victims > 1 else ""
    if victim.planned:
        why = f"a request waits and only adapters that the plan pins could make room ({unused})"
    elif victims > 1:
        why = f"in the group that is cheapest to evict: fewest plan pins, then longest unused ({unused})"
    else:
        why = f"least recently used of what could make room ({unused})"
    return f"evicted for {adapter.name}{together}: {why}"


def _cost(victims: Sequence[PoolEntry]) -> _Cost:
    """Return the cost of evicting ``victims`` as a sort key. A subset of ``victims`` always costs less."""
    return (
        sum(victim.planned for victim in victims),
        max(victim.used_s for victim in victims),
        sum(victim.adapter.slab_bytes for victim in victims),
        victims[0].offset_bytes,
    )


def _cost_in_requests(victims: Sequence[PoolEntry]) -> _Cost:
    """Return a sort key: the number of requests that run with ``victims``, then plan pins, bytes and offset.

    The key never increases unless another request starts running with a victim.
    """
    planned, _, slab_bytes, offset_bytes = _cost(victims)
    return sum(victim.running for victim in victims), planned, slab_bytes, offset_bytes
