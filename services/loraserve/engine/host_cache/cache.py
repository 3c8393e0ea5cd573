"""Decides which evicted slabs the host cache keeps, in which extents, and which cached slabs it drops for them.

The value of a slab is the waiting time that it saves: uses x reload seconds. Among the minimal sets of slabs whose
removal lets a new slab fit, the least valuable set is dropped, unless it is worth more than the slab. For extents of
one size, this ranks slabs like GreedyDual-Size-Frequency. That algorithm ages entries by inflating the values of new
ones. Here, uses decay over time. Sources: Cao and Irani, "Cost-Aware WWW Proxy Caching Algorithms", USENIX Symposium on
Internet Technologies and Systems, 1997; Cherkasova, HP Labs technical report HPL-98-69R1, 1998.
"""

from collections.abc import Callable, Iterable
from enum import Enum
from heapq import nlargest

import msgspec

from loraserve.adapter.format import SlabHeader
from loraserve.cost import MIN_EXTENT_BYTES
from loraserve.engine.adapters.pool import ExtentAllocator
from loraserve.messages import AdapterRef
from loraserve.story import Story

HALF_LIFE_S = 300.0
"""The weight of a request halves in this time. All weights decay alike, so only new requests change the order."""
MOST_VERSIONS = 4096

_Cost = tuple[float, float, int, int]


class _UseCount(msgspec.Struct):
    uses: float
    at_s: float


class UseCounts:
    """Counts the requests for each adapter version. Older requests count less. Rarely used versions are forgotten."""

    def __init__(self, half_life_s: float = HALF_LIFE_S, most: int = MOST_VERSIONS) -> None:
        self._half_life_s = half_life_s
        self._most = most
        self._counts: dict[str, _UseCount] = {}

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, version: str, now: float) -> None:
        self._counts[version] = _UseCount(self.get(version, now) + 1.0, now)
        if len(self._counts) > self._most:
            # Half of the versions are dropped at once, because scanning all counts at each request costs too much.
            kept = nlargest(max(1, self._most // 2), self._counts, key=lambda version: self.get(version, now))
            self._counts = {version: self._counts[version] for version in kept}

    def get(self, version: str, now: float) -> float:
        count = self._counts.get(version)
        return count.uses * 0.5 ** ((now - count.at_s) / self._half_life_s) if count else 0.0


class CachedState(Enum):
    """The states of a slab in the host cache: first SAVING, then SAVED, and DAMAGED if a check fails."""

    SAVING = "saving"
    """The slab is being copied from the pool."""
    SAVED = "saved"
    """The slab is complete. Loads and peers may read it."""
    DAMAGED = "damaged"
    """The bytes have changed. No new reads begin, and the slab is dropped after its last reader."""


class CachedSlab(msgspec.Struct):
    adapter: AdapterRef
    header: SlabHeader
    offset_bytes: int
    generation: int
    """The number of this placement, unique within the cache."""
    reload_s: float
    """Predicted seconds to load the slab from another source."""
    state: CachedState = CachedState.SAVING
    saved_s: float = 0.0
    """The time at which the copy from the pool finished."""
    leases: int = 0
    """Number of leases that peers hold on the slab."""
    reads: int = 0
    """Number of reads by this engine's own loads."""

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
    """The index of the slabs in one region of host memory. Slabs that are being read or saved are not dropped.

    A slab that is also in the pool (``is_in_pool``) has value 0, because it can be saved again on its eviction.
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
    def not_lendable(self) -> frozenset[str]:
        """The versions that get no new leases, because they are damaged."""
        return frozenset(version for version, slab in self._slabs.items() if slab.state is CachedState.DAMAGED)

    @property
    def free_bytes(self) -> int:
        return self._extents.free_bytes

    def offer(self, adapter: AdapterRef, header: SlabHeader, reload_s: float, now: float) -> int | None:
        """Return the offset at which to save a slab evicted from the pool, dropping other slabs if needed.

        Returns None if the slab is already cached, or if dropping slabs of lower value is not enough. The
        extent is reserved, and not read, until ``save_done`` or ``save_failed``.
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
        """Pin a slab for a read by this engine until ``end_read``. Return None if the slab is not readable."""
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
        """Mark a slab as damaged and drop it when nothing reads it. Current readers verify their bytes themselves."""
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
        """Raise AssertionError if an invariant of the extents, states or readers is broken."""
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
        """Return the slabs to drop for a new slab; None if it cannot fit, or is worth less than these slabs."""
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
        """Return a sort key for dropping: (value, time of the copy into the cache, bytes, offset)."""
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
