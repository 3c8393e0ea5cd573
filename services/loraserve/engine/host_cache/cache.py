"""Which slabs that left the pool are kept in host memory, where, and what leaves for them. Pure.

What is kept is worth its requests' waiting: value = uses x reload seconds. Of the sets that make room by leaving the
one of least value goes, if that is no more than the value of what comes. With extents of one size that is the least
value per byte, as in GreedyDual-Size (Cao and Irani, "Cost-Aware WWW Proxy Caching Algorithms", USENIX Symposium on
Internet Technologies and Systems, 1997) with frequency (Cherkasova, HP Labs technical report HPL-98-69R1, 1998). What
those do by inflating new values, uses that halve with time do here: what nobody asks for any more grows cheap.
"""

from collections.abc import Iterable
from heapq import nlargest

import msgspec

from loraserve.adapter.format import SlabHeader
from loraserve.cost import MIN_EXTENT_BYTES
from loraserve.engine.adapters.extents import ExtentAllocator
from loraserve.messages import AdapterRef
from loraserve.story import Story

_Cost = tuple[float, float, int, int]


class CachedSlab(msgspec.Struct):
    """One slab in the cache, or on its way there."""

    adapter: AdapterRef
    header: SlabHeader
    offset_bytes: int
    generation: int
    """Which of all that were ever given a place."""
    reload_s: float
    """Predicted, to have it from elsewhere."""
    saved_s: float | None = None
    """When all of it was there; None while it is copied."""
    leases: int = 0
    """Peers that read it."""
    reads: int = 0
    """Loads of this engine that read it."""
    in_pool: bool = False
    """The pool has it as well: here it only spares the copy when it leaves there."""
    damaged: bool = False
    """It is not what its digests are of: nobody begins to read it, and it goes with who reads it last."""

    @property
    def is_complete(self) -> bool:
        """As of the pool: all of it is there."""
        return self.saved_s is not None

    @property
    def readable(self) -> bool:
        return self.is_complete and not self.damaged

    @property
    def may_leave(self) -> bool:
        return self.is_complete and not self.leases and not self.reads


class HostCache:
    """Extents of one region of host memory. A slab is being saved, then there; what is read or being saved stays."""

    def __init__(self, cache_bytes: int, min_extent_bytes: int = MIN_EXTENT_BYTES) -> None:
        self._extents = ExtentAllocator(cache_bytes, min_extent_bytes)
        self._slabs: dict[str, CachedSlab] = {}
        self._uses = Uses()
        self._placed = 0
        self._story = Story()

    def get(self, version: str) -> CachedSlab | None:
        return self._slabs.get(version)

    def entries(self) -> Iterable[CachedSlab]:
        return self._slabs.values()

    def header(self, version: str) -> SlabHeader:
        """Of what is here."""
        return self._slabs[version].header

    @property
    def versions(self) -> tuple[str, ...]:
        """What can be read here."""
        return tuple(version for version, slab in self._slabs.items() if slab.readable)

    @property
    def awaited(self) -> frozenset[str]:
        """Nobody gets a lease on what is damaged."""
        return frozenset(version for version, slab in self._slabs.items() if slab.damaged)

    @property
    def free_bytes(self) -> int:
        """Of all holes together."""
        return self._extents.free_bytes

    def used(self, version: str, now: float) -> None:
        """A request for it came, wherever it is."""
        self._uses.add(version, now)

    def uses_of(self, version: str, now: float) -> float:
        """Its requests, those that were long ago counting less."""
        return self._uses.of(version, now)

    def loaded(self, version: str) -> None:
        """The pool has it."""
        slab = self._slabs.get(version)
        if slab is not None:
            slab.in_pool = True

    def unloaded(self, version: str) -> None:
        """The pool has it no more, and not as it should be: it is not offered."""
        slab = self._slabs.get(version)
        if slab is not None:
            slab.in_pool = False

    def offer(self, adapter: AdapterRef, header: SlabHeader, reload_s: float, now: float) -> int | None:
        """A slab leaves the pool: where to save it; None where it is here, or worth less than what is in its way.

        Until ``saved`` or ``failed`` nobody reads that place and nobody else gets it.
        """
        here = self._slabs.get(adapter.version)
        if here is not None:
            here.in_pool, here.reload_s = False, reload_s
            return None
        victims = self._victims(adapter, reload_s, now)
        if victims is None:
            self._story.tell(adapter.version, now, "not cached: what is in its way is worth more, or is read")
            return None
        for victim in victims:
            self._remove(victim)
            self._story.tell(victim.adapter.version, now, f"dropped for {adapter.name}")
        offset = self._extents.allocate(adapter.slab_bytes)
        assert offset is not None, "victims did not make the room they were chosen for"
        self._placed += 1
        self._slabs[adapter.version] = CachedSlab(adapter, header, offset, self._placed, reload_s)
        self._story.tell(adapter.version, now, f"saving to the host cache at {offset}")
        return offset

    def saved(self, version: str, now: float) -> None:
        """All of it is there."""
        self._slabs[version].saved_s = now
        self._story.tell(version, now, "saved")

    def failed(self, version: str, now: float) -> None:
        """It could not be saved."""
        slab = self._slabs[version]
        assert not slab.is_complete, f"{version} was saved already"
        self._remove(slab)
        self._story.tell(version, now, "could not be saved")

    def read(self, version: str) -> CachedSlab | None:
        """Pin for one more load of this engine until ``done``; None where it cannot be read here."""
        slab = self._slabs.get(version)
        if slab is None or not slab.readable:
            return None
        slab.reads += 1
        return slab

    def done(self, slab: CachedSlab) -> None:
        """A load does not read it any more."""
        assert self._slabs.get(slab.adapter.version) is slab, f"{slab.adapter.version} left while it was read"
        slab.reads -= 1
        self._drop_damaged(slab)

    def damage(self, version: str, now: float) -> None:
        """It is not what was saved: whoever reads it finds out, and nobody else gets to."""
        slab = self._slabs.get(version)
        if slab is not None and slab.is_complete and not slab.damaged:
            slab.damaged = True
            self._story.tell(version, now, "damaged: it goes with who reads it last")
            self._drop_damaged(slab)

    def lease(self, version: str) -> CachedSlab:
        """Pin for one more peer."""
        slab = self._slabs[version]
        assert slab.readable, f"{version} was leased before it is saved"
        slab.leases += 1
        return slab

    def end_lease(self, version: str, generation: int) -> None:
        slab = self._slabs[version]
        assert slab.generation == generation, f"{version} left while it was leased"
        slab.leases -= 1
        self._drop_damaged(slab)

    def story(self, version: str) -> list[str]:
        """What happened to an adapter here."""
        return self._story.lines(version)

    def validate(self) -> None:
        """Every slab has an extent of its own and no extent is without, and only what is there is read."""
        self._extents.validate()
        for version, slab in self._slabs.items():
            assert slab.adapter.version == version, version
            assert slab.leases >= 0, f"{version} has {slab.leases} leases"
            assert slab.reads >= 0, f"{version} is read {slab.reads} times"
            assert slab.is_complete or not slab.leases + slab.reads, f"{version} is read before it is saved"
            assert not slab.damaged or slab.leases or slab.reads, f"{version} is damaged and stays for nobody"
            end = slab.offset_bytes + slab.adapter.slab_bytes
            assert self._extents.used_in(slab.offset_bytes, end) == [slab.offset_bytes], f"{version} shares its extent"
        taken = sum(self._extents.extent_bytes(slab.adapter.slab_bytes) for slab in self._slabs.values())
        assert taken + self._extents.free_bytes == self._extents.largest_bytes, "an extent is nobody's"

    def _victims(self, adapter: AdapterRef, reload_s: float, now: float) -> list[CachedSlab] | None:
        """What leaves for it; None where it had better stay away."""
        if self._extents.fits(adapter.slab_bytes):
            return []
        ready = {slab.offset_bytes: slab for slab in self._slabs.values() if slab.may_leave}
        costs = {offset: self._cost(slab, now) for offset, slab in ready.items()}
        runs = self._extents.runs(adapter.slab_bytes, ready)
        cheapest = min(runs, key=lambda run: _together([costs[start] for start in run]), default=None)
        if cheapest is None or sum(costs[start][0] for start in cheapest) > self._value(adapter, reload_s, now):
            return None
        return [ready[start] for start in cheapest]

    def _cost(self, slab: CachedSlab, now: float) -> _Cost:
        """What is lost with it, then when it was saved, its bytes, its place."""
        value = 0.0 if slab.in_pool else self._value(slab.adapter, slab.reload_s, now)
        return value, slab.saved_s or 0.0, slab.adapter.slab_bytes, slab.offset_bytes

    def _value(self, adapter: AdapterRef, reload_s: float, now: float) -> float:
        return self.uses_of(adapter.version, now) * reload_s

    def _drop_damaged(self, slab: CachedSlab) -> None:
        if slab.damaged and slab.may_leave:
            self._remove(slab)

    def _remove(self, slab: CachedSlab) -> None:
        assert not slab.leases + slab.reads, f"{slab.adapter.version} left while it was read"
        self._extents.release(slab.offset_bytes)
        del self._slabs[slab.adapter.version]


def _together(costs: list[_Cost]) -> _Cost:
    """Of a run of neighbours."""
    return sum(c[0] for c in costs), max(c[1] for c in costs), sum(c[2] for c in costs), costs[0][3]


HALF_LIFE_S = 300.0
"""A request counts half after so long. Of all who halve alike the order changes only with new requests."""
MOST_VERSIONS = 4096


class _Count(msgspec.Struct):
    uses: float
    at_s: float


class Uses:
    """Requests by adapter version, older ones count less. Of too many those that were asked for least are forgotten."""

    def __init__(self, half_life_s: float = HALF_LIFE_S, most: int = MOST_VERSIONS) -> None:
        self._half_life_s = half_life_s
        self._most = most
        self._counts: dict[str, _Count] = {}

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, version: str, now: float) -> None:
        """One request more."""
        self._counts[version] = _Count(self.of(version, now) + 1.0, now)
        if len(self._counts) > self._most:
            # Half at once: to look at all of them is not the price of each request.
            kept = nlargest(max(1, self._most // 2), self._counts, key=lambda version: self.of(version, now))
            self._counts = {version: self._counts[version] for version in kept}

    def of(self, version: str, now: float) -> float:
        """0 for who was never heard of."""
        count = self._counts.get(version)
        return count.uses * 0.5 ** ((now - count.at_s) / self._half_life_s) if count else 0.0
