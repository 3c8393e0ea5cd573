"""Which adapters leave the pool to make room for another one.

Only a set of adapters that makes enough room by leaving, and of which none could stay, is a choice: where a slot is
missing, any single adapter; where memory is missing, a run of neighbours. The cheapest choice leaves: the one with the
fewest plan pins, then the one whose last use is longest ago, then the fewest bytes, then the lowest offset. Adapters
that a plan pins are choices only where a waiting request asks for the room.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from heapq import nsmallest

from loraserve.engine.adapters.extents import ExtentAllocator
from loraserve.engine.adapters.lifecycle import PoolEntry
from loraserve.messages import AdapterRef

_Cost = tuple[int, float, int, int]


class EvictionPolicy:
    """Finds room in the pool whose ``entries``, ``extents`` and ``free_slots`` it is given; it changes nothing."""

    def __init__(self, entries: Mapping[str, PoolEntry], extents: ExtentAllocator, free_slots: Sequence[int]) -> None:
        self._entries = entries
        self._extents = extents
        self._free_slots = free_slots

    @property
    def free_bytes(self) -> int:
        """The free bytes and those of adapters that may leave at once; they need not lie in one piece."""
        return self._extents.free_bytes + sum(
            self._extents.extent_bytes(e.adapter.slab_bytes) for e in self._entries.values() if e.evictable
        )

    @property
    def room_bytes(self) -> int:
        """The largest extent that a request's adapter can get now, by evicting what no request runs with."""
        idle = {e.offset_bytes for e in self._entries.values() if e.is_complete and not e.running and not e.leases}
        return self._extents.largest_hole_without(idle) if idle or self._free_slots else 0

    def find_victims(
        self, adapter: AdapterRef, keep: Collection[str] = (), drop_plan_pins: bool = False
    ) -> list[PoolEntry] | None:
        """Return the entries to evict for ``adapter``, none if there is room; None where no choice makes room."""
        idle = self._idle(keep, drop_plan_pins)
        return self._cheapest(adapter.slab_bytes, [entry for entry in idle if not entry.leases])

    def find_leased_victims(
        self, adapter: AdapterRef, keep: Collection[str] = (), drop_plan_pins: bool = False
    ) -> frozenset[str]:
        """Return the versions whose leases have to end so that ``adapter`` finds room; none if that is not enough."""
        if not any(entry.leases for entry in self._entries.values()):
            return frozenset()
        victims = self._cheapest(adapter.slab_bytes, self._idle(keep, drop_plan_pins))
        return frozenset(victim.adapter.version for victim in victims or () if victim.leases)

    def fits_beside_plan(self, adapter: AdapterRef) -> bool:
        """Return whether ``adapter`` would find room once every adapter without a plan pin had left."""
        others = [entry for entry in self._entries.values() if not entry.planned]
        return self._cheapest(adapter.slab_bytes, others) is not None

    def find_blockers(self, adapter: AdapterRef, places: int) -> frozenset[str]:
        """Return the versions that have to leave before ``adapter`` finds room in one of ``places`` places.

        The places are those with the fewest running requests; leases count nothing, as they end by themselves. None
        blocks if adapters that no request runs with can make the room now.
        """
        if self._extents.extent_bytes(adapter.slab_bytes) <= self.room_bytes:
            return frozenset()
        choices = self._choices(adapter.slab_bytes, list(self._entries.values()))
        cheapest = nsmallest(places, choices, key=_cost_in_requests)
        return frozenset(entry.adapter.version for choice in cheapest for entry in choice)

    def _idle(self, keep: Collection[str], drop_plan_pins: bool) -> list[PoolEntry]:
        """Return the entries that may leave once their leases have ended."""
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
        """Yield each set of ``removable`` entries that makes room by leaving and of which none could stay."""
        if self._extents.fits(wanted_bytes):
            yield from ([entry] for entry in removable)
            return
        by_offset = {entry.offset_bytes: entry for entry in removable}
        for run in self._extents.runs(wanted_bytes, by_offset):
            yield [by_offset[start] for start in run]


def describe_eviction(victim: PoolEntry, victims: int, adapter: AdapterRef, now: float) -> str:
    """Return why ``victim``, one of ``victims`` adapters, leaves for ``adapter``: a text for logs and stories."""
    unused = f"unused for {now - victim.used_s:.1f} s"
    together = f" with {victims - 1} beside it" if victims > 1 else ""
    if victim.planned:
        why = f"a request waits and only adapters that the plan pins could make room ({unused})"
    else:
        why = f"least recently used of what could make room ({unused})"
    return f"evicted for {adapter.name}{together}: {why}"


def _cost(victims: Sequence[PoolEntry]) -> _Cost:
    """Return what evicting ``victims`` costs; less for a part of them that makes room as well."""
    return (
        sum(victim.planned for victim in victims),
        max(victim.used_s for victim in victims),
        sum(victim.adapter.slab_bytes for victim in victims),
        victims[0].offset_bytes,
    )


def _cost_in_requests(victims: Sequence[PoolEntry]) -> _Cost:
    """Return the number of requests that run with ``victims``, then their cost without the last use.

    It only falls while no further request begins to run with them.
    """
    planned, _, slab_bytes, offset_bytes = _cost(victims)
    return sum(victim.running for victim in victims), planned, slab_bytes, offset_bytes
