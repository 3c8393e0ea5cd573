"""Which adapters are in the pool, where, and who needs them there. Pure.

An adapter is LOADING or RESIDENT. It stays while a request runs it, while the plan wants it, while it loads or while
a peer has a lease on its extent; the rest goes, least recently used first, when room is wanted.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from heapq import nsmallest

import msgspec

from loraserve.cost import MIN_EXTENT_BYTES
from loraserve.engine.adapters.extents import ExtentAllocator
from loraserve.engine.adapters.lifecycle import Entry
from loraserve.messages import AdapterRef

_Cost = tuple[int, float, int, int]


class Placed(msgspec.Struct, frozen=True):
    """Where a new adapter goes, and what had to leave for it."""

    slot: int
    offset_bytes: int
    evicted: tuple[Entry, ...]


class AdapterPool:
    """The engine's adapter memory: extents, slots, pins, least recently used."""

    def __init__(
        self, pool_bytes: int, slots: int, min_extent_bytes: int = MIN_EXTENT_BYTES, max_rank: int | None = None
    ) -> None:
        self._extents = ExtentAllocator(pool_bytes, min_extent_bytes)
        self._pool_bytes = pool_bytes
        self._slots = slots
        self._max_rank = max_rank
        self._free_slots = list(range(slots - 1, -1, -1))
        self._entries: dict[str, Entry] = {}
        self._placed = 0
        self.leases = 0
        self._awaited: frozenset[str] = frozenset()
        self.damaged: set[str] = set()
        """Nobody begins to use these, some of which never were all here; each goes with the last that does."""
        self.plan_pins_dropped = 0

    def __contains__(self, version: str) -> bool:
        return version in self._entries

    def get(self, version: str) -> Entry | None:
        return self._entries.get(version)

    def entries(self) -> Iterable[Entry]:
        return self._entries.values()

    @property
    def awaited(self) -> frozenset[str]:
        """Versions that have to leave once their leases end, for room or for damage: nobody gets new ones."""
        return self._awaited | self.damaged

    def await_leases(self, versions: frozenset[str]) -> None:
        """Of those that are in the way of what finds no room."""
        self._awaited = versions

    def await_also(self, versions: frozenset[str]) -> None:
        """Beside those that were."""
        self._awaited |= versions

    @property
    def free_bytes(self) -> int:
        """Free now, plus what would leave at once if room were wanted; not all of it need lie in one piece."""
        return self._extents.free_bytes + sum(
            self._extents.extent_bytes(e.adapter.slab_bytes) for e in self._entries.values() if e.evictable
        )

    @property
    def room_bytes(self) -> int:
        """The largest extent that a request's adapter would find now, once what no request needs had left for it."""
        idle = {e.offset_bytes for e in self._entries.values() if e.resident and not e.running and not e.leases}
        return self._extents.longest_without(idle) if idle or self._free_slots else 0

    @property
    def loading(self) -> int:
        over = sum(not self._entries[version].resident for version in self.damaged)
        return sum(not entry.resident for entry in self._entries.values()) - over

    def is_loading(self, version: str) -> bool:
        return version in self._entries and not self._entries[version].resident

    def arrives(self, version: str) -> bool:
        """It loads, and that load will not be in vain as far as is known."""
        entry = self._entries.get(version)
        return entry is not None and not (entry.resident or entry.cancelled or version in self.damaged)

    def refusal(self, adapter: AdapterRef) -> str | None:
        """Why this adapter can never be held here, with the remedy; None where it can."""
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
        """Room for an adapter that is absent, as LOADING; None where all that is in the way is needed.

        Nothing is evicted in vain: victims are taken only when they make the room. Versions in ``keep`` stay.
        """
        ready = [entry for entry in self._idle(keep, drop_plan_pins) if not entry.leases]
        victims = self._victims(adapter.slab_bytes, ready)
        if victims is None:
            return None
        for victim in victims:
            self.plan_pins_dropped += victim.planned
            self._remove(victim)
        offset = self._extents.allocate(adapter.slab_bytes)
        assert offset is not None, "victims did not make the room they were chosen for"
        slot = self._free_slots.pop()
        self._placed += 1
        self._entries[adapter.version] = Entry(adapter, slot, offset, self._placed, used_s=now)
        return Placed(slot, offset, tuple(victims))

    def leased_in_the_way(
        self, adapter: AdapterRef, keep: Collection[str] = (), drop_plan_pins: bool = False
    ) -> frozenset[str]:
        """Where ``place`` finds no room: the adapters whose leases have to end for it; none where that is not all."""
        if not self.leases:
            return frozenset()
        victims = self._victims(adapter.slab_bytes, self._idle(keep, drop_plan_pins))
        return frozenset(victim.adapter.version for victim in victims or () if victim.leases)

    def room_beside_plan(self, adapter: AdapterRef) -> bool:
        """Whether it would find room once all had left that no plan wants: those that run or load now as well."""
        others = [entry for entry in self._entries.values() if not entry.planned]
        return self._victims(adapter.slab_bytes, others) is not None

    def in_the_way(self, adapter: AdapterRef, places: int) -> frozenset[str]:
        """Which adapters have to leave before this one finds room in one of so many places: those with the fewest
        running requests; leases end by themselves. None where what nobody needs can leave now."""
        if self._extents.extent_bytes(adapter.slab_bytes) <= self.room_bytes:
            return frozenset()
        choices = self._choices(adapter.slab_bytes, list(self._entries.values()))
        return frozenset(e.adapter.version for choice in nsmallest(places, choices, key=_requests) for e in choice)

    def loaded(self, version: str) -> Entry:
        entry = self._entries[version]
        entry.resident, entry.cancelled = True, False
        return entry

    def cancel(self, wanted: Collection[str]) -> list[str]:
        """Versions on their way that are not ``wanted`` and were not cancelled before: from now on they are."""
        unwanted = [v for v, e in self._entries.items() if e.cancellable and v not in wanted and v not in self.damaged]
        for version in unwanted:
            self._entries[version].cancelled = True
        return unwanted

    def load_failed(self, version: str) -> Entry | None:
        """The entry that is gone; None where it goes with the last that began with it before it was all there."""
        entry = self._entries[version]
        if entry.running:
            self.damaged.add(version)
            return None
        self._remove(entry)
        return entry

    def damage(self, version: str) -> bool:
        """False where it is not there any more, or was damaged already."""
        entry = self._entries.get(version)
        found = entry is not None and entry.resident and version not in self.damaged
        if found:
            self.damaged.add(version)
        return found

    def take_damaged(self) -> list[Entry]:
        """Those that nobody uses any more; they are gone."""
        damaged = map(self._entries.__getitem__, sorted(self.damaged))
        gone = [entry for entry in damaged if not entry.running and not entry.leases]
        for entry in gone:
            self._remove(entry)
        return gone

    def start_running(self, version: str, now: float) -> int:
        """Pin for one more request; the adapter's slot."""
        entry = self._entries[version]
        entry.running += 1
        entry.ran = True
        entry.used_s = now
        return entry.slot

    def stop_running(self, version: str, now: float) -> None:
        entry = self._entries[version]
        entry.running -= 1
        entry.used_s = now

    def lease(self, version: str) -> Entry:
        """Pin for one more reader; the entry that it reads."""
        entry = self._entries[version]
        assert entry.resident, f"{version} was leased before it is loaded"
        entry.leases += 1
        self.leases += 1
        return entry

    def end_lease(self, version: str, generation: int) -> None:
        entry = self._entries[version]
        assert entry.generation == generation, f"{version} left while it was leased"
        entry.leases -= 1
        self.leases -= 1

    def plan(self, version: str, wanted: bool, epoch: int = 0) -> bool:
        """Set the pin of the plan of an epoch, or drop it; True where that changed something."""
        entry = self._entries.get(version)
        changed = entry is not None and entry.planned != wanted
        if entry is not None:
            entry.planned = wanted
            entry.planned_epoch = epoch if wanted else 0
        return changed

    def validate(self) -> None:
        """Extents disjoint and as large as their slabs, slots given out once, counts not negative."""
        self._extents.validate()
        slots = [entry.slot for entry in self._entries.values()] + self._free_slots
        assert sorted(slots) == list(range(self._slots)), "a slot is lost or given out twice"
        for version, entry in self._entries.items():
            assert entry.adapter.version == version, version
            assert entry.running >= 0, f"{version} runs {entry.running} times"
            assert entry.leases >= 0, f"{version} has {entry.leases} leases"
            assert entry.resident or not entry.leases, f"{version} is lent before it is loaded"
            assert not (entry.resident and entry.cancelled), f"{version} is here and its load is being ended"
            used = self._extents.used_in(entry.offset_bytes, entry.offset_bytes + entry.adapter.slab_bytes)
            assert used == [entry.offset_bytes], f"{version} shares its extent"
        assert self.leases == sum(entry.leases for entry in self._entries.values()), "a lease is on nothing"

    def _idle(self, keep: Collection[str], drop_plan_pins: bool) -> list[Entry]:
        """Who would leave if nobody had leases."""
        return [
            entry
            for version, entry in self._entries.items()
            if version not in keep and entry.resident and not entry.running and (drop_plan_pins or not entry.planned)
        ]

    def _victims(self, wanted_bytes: int, ready: list[Entry]) -> list[Entry] | None:
        """The cheapest of ``ready`` whose leaving makes room; none has to leave where there is room."""
        if self._free_slots and self._extents.fits(wanted_bytes):
            return []
        return min(self._choices(wanted_bytes, ready), key=_cost, default=None)

    def _choices(self, wanted_bytes: int, ready: list[Entry]) -> Iterator[list[Entry]]:
        """Of ``ready``, where there is no room: each set that makes it by leaving, without a member to spare."""
        if self._extents.fits(wanted_bytes):
            yield from ([entry] for entry in ready)
            return
        by_offset = {entry.offset_bytes: entry for entry in ready}
        for run in self._extents.runs(wanted_bytes, by_offset):
            yield [by_offset[start] for start in run]

    def _remove(self, entry: Entry) -> None:
        assert not entry.leases, f"{entry.adapter.version} left while it was leased"
        self._extents.release(entry.offset_bytes)
        self._free_slots.append(entry.slot)
        del self._entries[entry.adapter.version]
        self.damaged.discard(entry.adapter.version)


def _cost(victims: Sequence[Entry]) -> _Cost:
    """Fewest plan pins, longest unused, least bytes, lowest: of a run with a member to spare more than without it."""
    return (
        sum(victim.planned for victim in victims),
        max(victim.used_s for victim in victims),
        sum(victim.adapter.slab_bytes for victim in victims),
        victims[0].offset_bytes,
    )


def _requests(victims: Sequence[Entry]) -> _Cost:
    """Fewest requests that run with them, then as above. It only falls while nobody begins to run with them."""
    planned, _, slab_bytes, offset_bytes = _cost(victims)
    return sum(victim.running for victim in victims), planned, slab_bytes, offset_bytes
