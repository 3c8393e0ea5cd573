"""Decides which slabs that leave the pool are kept in host memory, where, and which leave for them.

The value of a slab is the waiting that it saves its requests: uses x reload seconds. Of the sets of slabs that make
room by leaving, the one of least value goes, if its value is no more than that of the new slab. With extents of one
size that is the least value per byte, as in GreedyDual-Size (Cao and Irani, "Cost-Aware WWW Proxy Caching Algorithms",
USENIX Symposium on Internet Technologies and Systems, 1997) with frequency (Cherkasova, HP Labs technical report
HPL-98-69R1, 1998). Those algorithms let old slabs grow cheap by inflating new values; here uses halve with time.
"""

from collections.abc import Callable, Iterable
from enum import Enum
from heapq import nlargest

import msgspec

from loraserve.adapter.format import SlabHeader
from loraserve.cost import MIN_EXTENT_BYTES
from loraserve.engine.adapters.extents import ExtentAllocator
from loraserve.messages import AdapterRef
from loraserve.story import Story

HALF_LIFE_S = 300.0
"""A request counts half after so long. As all halve alike, only new requests change the order of adapters."""
MOST_VERSIONS = 4096

_Cost = tuple[float, float, int, int]


class _UseCount(msgspec.Struct):
    uses: float
    at_s: float


class UseCounts:
    """Counts the requests for each adapter version; older ones count less. The rarest of too many are forgotten."""

    def __init__(self, half_life_s: float = HALF_LIFE_S, most: int = MOST_VERSIONS) -> None:
        self._half_life_s = half_life_s
        self._most = most
        self._counts: dict[str, _UseCount] = {}

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, version: str, now: float) -> None:
        self._counts[version] = _UseCount(self.get(version, now) + 1.0, now)
        if len(self._counts) > self._most:
            # Half of them at once: looking at all counts would cost too much at each request.
            kept = nlargest(max(1, self._most // 2), self._counts, key=lambda version: self.get(version, now))
            self._counts = {version: self._counts[version] for version in kept}

    def get(self, version: str, now: float) -> float:
        count = self._counts.get(version)
        return count.uses * 0.5 ** ((now - count.at_s) / self._half_life_s) if count else 0.0


class CachedState(Enum):
    """The states of a slab in the host cache: it is SAVING first, then SAVED, and perhaps found DAMAGED."""

    SAVING = "saving"
    """It is being copied out of the pool."""
    SAVED = "saved"
    """All of it is there; loads and peers may read it."""
    DAMAGED = "damaged"
    """Its bytes have changed. No read of it begins, and it leaves with its last reader."""


class CachedSlab(msgspec.Struct):
    adapter: AdapterRef
    header: SlabHeader
    offset_bytes: int
    generation: int
    """Numbers all slabs that were ever given an extent."""
    reload_s: float
    """The predicted seconds to load it from elsewhere."""
    state: CachedState = CachedState.SAVING
    saved_s: float = 0.0
    """When all of it was there."""
    leases: int = 0
    """Peers that read it."""
    reads: int = 0
    """Loads of this engine that read it."""

    @property
    def is_complete(self) -> bool:
        return self.state is not CachedState.SAVING

    @property
    def is_readable(self) -> bool:
        return self.state is CachedState.SAVED

    @property
    def evictable(self) -> bool:
        return self.is_complete and not self.leases and not self.reads


class HostCache:
    """Extents of one region of host memory. Slabs that are being read or saved stay.

    A slab that is also resident in the engine's pool (``is_in_pool``) has no value here: it only spares the copy when
    it leaves there.
    """

    def __init__(
        self,
        cache_bytes: int,
        is_in_pool: Callable[[str], bool] = lambda version: False,
        story: Story | None = None,
        min_extent_bytes: int = MIN_EXTENT_BYTES,
    ) -> None:
        self.uses = UseCounts()
        self._is_in_pool = is_in_pool
        self._extents = ExtentAllocator(cache_bytes, min_extent_bytes)
        self._slabs: dict[str, CachedSlab] = {}
        self._placements = 0
        self.story = story or Story()

    def get(self, version: str) -> CachedSlab | None:
        return self._slabs.get(version)

    def entries(self) -> Iterable[CachedSlab]:
        return self._slabs.values()

    @property
    def versions(self) -> tuple[str, ...]:
        return tuple(version for version, slab in self._slabs.items() if slab.is_readable)

    @property
    def awaited(self) -> frozenset[str]:
        """The versions that get no new leases, as they are damaged."""
        return frozenset(version for version, slab in self._slabs.items() if slab.state is CachedState.DAMAGED)

    @property
    def free_bytes(self) -> int:
        return self._extents.free_bytes

    def offer(self, adapter: AdapterRef, header: SlabHeader, reload_s: float, now: float) -> int | None:
        """Return where to save a slab that leaves the pool; None if it is here already or worth less than its victims.

        Until ``save_done`` or ``save_failed`` nothing reads that extent and nothing else gets it.
        """
        here = self._slabs.get(adapter.version)
        if here is not None:
            here.reload_s = reload_s
            return None
        victims = self._find_victims(adapter, reload_s, now)
        if victims is None:
            self.story.tell(adapter.version, now, "not cached: what would make room is worth more, or is being read")
            return None
        for victim in victims:
            self._remove(victim)
            self.story.tell(victim.adapter.version, now, f"dropped from the host cache for {adapter.name}")
        offset = self._extents.allocate(adapter.slab_bytes)
        assert offset is not None, "victims did not make the room they were chosen for"
        self._placements += 1
        self._slabs[adapter.version] = CachedSlab(adapter, header, offset, self._placements, reload_s)
        self.story.tell(adapter.version, now, f"saving to the host cache at {offset}")
        return offset

    def save_done(self, version: str, now: float) -> None:
        slab = self._slabs[version]
        assert slab.state is CachedState.SAVING, f"{version} was saved already"
        slab.state, slab.saved_s = CachedState.SAVED, now
        self.story.tell(version, now, "saved in the host cache")

    def save_failed(self, version: str, now: float) -> None:
        slab = self._slabs[version]
        assert slab.state is CachedState.SAVING, f"{version} was saved already"
        self._remove(slab)
        self.story.tell(version, now, "could not be saved in the host cache")

    def begin_read(self, version: str) -> CachedSlab | None:
        """Pin a slab for one more load of this engine until ``end_read``; return None if it cannot be read here."""
        slab = self._slabs.get(version)
        if slab is None or not slab.is_readable:
            return None
        slab.reads += 1
        return slab

    def end_read(self, slab: CachedSlab) -> None:
        assert self._slabs.get(slab.adapter.version) is slab, f"{slab.adapter.version} left while it was read"
        slab.reads -= 1
        self._drop_damaged(slab)

    def damage(self, version: str, now: float) -> None:
        """Let no read of a damaged slab begin; drop it once nothing reads it. Its readers verify what they have."""
        slab = self._slabs.get(version)
        if slab is not None and slab.is_readable:
            slab.state = CachedState.DAMAGED
            self.story.tell(version, now, "damaged in the host cache: it leaves with its last reader")
            self._drop_damaged(slab)

    def lease(self, version: str) -> CachedSlab:
        slab = self._slabs[version]
        assert slab.is_readable, f"{version} was leased while it is {slab.state.value}"
        slab.leases += 1
        return slab

    def end_lease(self, version: str, generation: int) -> None:
        slab = self._slabs[version]
        assert slab.generation == generation, f"{version} left while it was leased"
        slab.leases -= 1
        self._drop_damaged(slab)

    def validate(self) -> None:
        """Raise AssertionError naming the invariant that is broken: extents, states, readers."""
        self._extents.validate()
        for version, slab in self._slabs.items():
            readers = slab.leases + slab.reads
            assert slab.adapter.version == version, version
            assert slab.leases >= 0, f"{version} has {slab.leases} leases"
            assert slab.reads >= 0, f"{version} is read {slab.reads} times"
            assert slab.is_complete or not readers, f"{version} is read before it is saved"
            assert slab.state is not CachedState.DAMAGED or readers, f"{version} is damaged and nothing reads it"
            end = slab.offset_bytes + slab.adapter.slab_bytes
            assert self._extents.used_in(slab.offset_bytes, end) == [slab.offset_bytes], f"{version} shares its extent"
        taken = sum(self._extents.extent_bytes(slab.adapter.slab_bytes) for slab in self._slabs.values())
        assert taken + self._extents.free_bytes == self._extents.largest_bytes, "an extent belongs to no slab"

    def _find_victims(self, adapter: AdapterRef, reload_s: float, now: float) -> list[CachedSlab] | None:
        """Return the slabs to drop for a new one; None if it is worth less than any that make room."""
        if self._extents.fits(adapter.slab_bytes):
            return []
        removable = {slab.offset_bytes: slab for slab in self._slabs.values() if slab.evictable}
        costs = {offset: self._cost(slab, now) for offset, slab in removable.items()}
        runs = self._extents.runs(adapter.slab_bytes, removable)
        cheapest = min(runs, key=lambda run: _add_costs([costs[start] for start in run]), default=None)
        if cheapest is None or sum(costs[start][0] for start in cheapest) > self._value(adapter, reload_s, now):
            return None
        return [removable[start] for start in cheapest]

    def _cost(self, slab: CachedSlab, now: float) -> _Cost:
        """Return the value that is lost with a slab, then when it was saved, its bytes, its offset."""
        value = 0.0 if self._is_in_pool(slab.adapter.version) else self._value(slab.adapter, slab.reload_s, now)
        return value, slab.saved_s, slab.adapter.slab_bytes, slab.offset_bytes

    def _value(self, adapter: AdapterRef, reload_s: float, now: float) -> float:
        return self.uses.get(adapter.version, now) * reload_s

    def _drop_damaged(self, slab: CachedSlab) -> None:
        if slab.state is CachedState.DAMAGED and slab.evictable:
            self._remove(slab)

    def _remove(self, slab: CachedSlab) -> None:
        assert not slab.leases + slab.reads, f"{slab.adapter.version} left while it was read"
        self._extents.release(slab.offset_bytes)
        del self._slabs[slab.adapter.version]


def _add_costs(costs: list[_Cost]) -> _Cost:
    return sum(c[0] for c in costs), max(c[1] for c in costs), sum(c[2] for c in costs), costs[0][3]
