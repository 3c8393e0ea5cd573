"""Leases: promises to peers that an extent is not used for anything else while they read it. Pure.

A lease ends by its release, by its deadline, or with its reader; renewals put the deadline off, but not for ever. What
ends tells nobody: whoever read until then verifies what it has.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Protocol

import msgspec

from loraserve.messages import AdapterRef
from loraserve.story import Story


class Held(Protocol):
    """A slab where it lies."""

    @property
    def adapter(self) -> AdapterRef: ...
    @property
    def offset_bytes(self) -> int: ...
    @property
    def generation(self) -> int:
        """Another slab in the same extent, or the same at another time, has another one."""
        ...

    @property
    def is_complete(self) -> bool:
        """All of it is there."""
        ...

    @property
    def leases(self) -> int: ...


class Holdings(Protocol):
    """What has slabs to lend: the pool, or the host cache. What is leased stays there."""

    @property
    def awaited(self) -> frozenset[str]:
        """Versions that have to leave once their leases end: nobody gets new ones."""
        ...

    def get(self, version: str) -> Held | None: ...
    def entries(self) -> Iterable[Held]: ...
    def lease(self, version: str) -> Held:
        """Pin for one more reader; what it reads."""
        ...

    def end_lease(self, version: str, generation: int) -> None: ...


class LeaseLimits(msgspec.Struct, frozen=True, kw_only=True):
    """A lease lasts ``lasts_s`` and, renewed, at most ``longest_s``: whoever waits for its extent can count on that."""

    lasts_s: float
    longest_s: float
    most: int = 256
    most_a_reader: int = 16


class Reader(msgspec.Struct, frozen=True):
    """A peer, in one of its lives."""

    name: str
    incarnation: str


class Lease(msgspec.Struct):
    """``read_id`` is the reader's own for what it is doing; ``generation`` is that of what it reads."""

    lease_id: str
    reader: Reader
    read_id: str
    version: str
    generation: int
    offset_bytes: int
    granted_s: float
    deadline_s: float


class Refused(msgspec.Struct, frozen=True):
    """``code`` as in LeaseSlab, RenewLease and ReleaseLease."""

    code: str
    message: str


class Ended(msgspec.Struct, frozen=True):
    """``why``: ``released``, ``expired`` or ``reader_gone``."""

    lease: Lease
    why: str


class Leases:
    """Who reads what of one region. ``region_id`` differs from that of any other region, also of this engine's past."""

    def __init__(self, region_id: str, holdings: Holdings, limits: LeaseLimits) -> None:
        self._region_id = region_id
        self._holdings = holdings
        self._limits = limits
        self._leases: dict[str, Lease] = {}
        self._granted = 0
        self._ended: list[Ended] = []
        self._story = Story()

    def __len__(self) -> int:
        return len(self._leases)

    def __contains__(self, lease_id: str) -> bool:
        return lease_id in self._leases

    def is_of(self, lease_id: str, name: str, version: str) -> bool:
        """Whether this is a reader's lease on that slab."""
        lease = self._leases.get(lease_id)
        return lease is not None and (lease.reader.name, lease.version) == (name, version)

    def reads(self, reader: Reader, read_id: str, version: str) -> bool:
        """Whether this read has a lease."""
        return self._lease_of(reader, read_id, version) is not None

    def grant(self, reader: Reader, read_id: str, version: str, slab_bytes: int, now: float) -> Lease | Refused:
        """A lease on a resident slab; the one that this read has already where it asks again."""
        self.expire(now)
        self.reader_lives(reader, now)
        entry = self._holdings.get(version)
        if entry is None or not entry.is_complete or entry.adapter.slab_bytes != slab_bytes:
            return _unfit(entry, version, slab_bytes)
        again = self._lease_of(reader, read_id, version)
        return again or self._full(version, len(self._of(reader.name))) or self._grant(reader, read_id, version, now)

    def renew(self, reader: Reader, lease_id: str, now: float) -> Lease | Refused:
        """As long again from now on, within what any lease may last."""
        lease = self._held(reader, lease_id, now)
        if lease is None:
            return Refused("expired", f"lease {lease_id} has ended; ask for a new one and read again")
        if isinstance(lease, Lease):
            latest_s = lease.granted_s + self._limits.longest_s
            lease.deadline_s = max(lease.deadline_s, min(now + self._limits.lasts_s, latest_s))
        return lease

    def release(self, reader: Reader, lease_id: str, now: float) -> bool | Refused:
        """Whether it was held until now; released before or expired, it was not."""
        lease = self._held(reader, lease_id, now)
        if isinstance(lease, Refused):
            return lease
        if lease is not None:
            self._end(lease, "released", now)
        return lease is not None

    def reader_lives(self, reader: Reader, now: float) -> None:
        """What its past self had ends, for that one is dead."""
        for lease in self._of(reader.name):
            if lease.reader != reader:
                self._end(lease, "reader_gone", now)

    def reader_gone(self, reader: Reader, now: float) -> None:
        """It died: it reads nothing any more. Its next life may have leases already."""
        for lease in self._of(reader.name):
            if lease.reader == reader:
                self._end(lease, "reader_gone", now)

    def expire(self, now: float) -> None:
        """End what is past its deadline."""
        for lease in [lease for lease in self._leases.values() if lease.deadline_s <= now]:
            self._end(lease, "expired", now)

    def take_ended(self) -> list[Ended]:
        """What ended since this was asked last: there may be room now."""
        ended, self._ended = self._ended, []
        return ended

    def story(self, subject: str) -> list[str]:
        """What happened to an adapter's extent (by version), or to a lease (by id)."""
        return self._story.lines(subject)

    def validate(self) -> None:
        """Each is on the very entry that it was granted for, nothing else is leased, and the bounds hold."""
        for lease in self._leases.values():
            entry = self._holdings.get(lease.version)
            assert entry is not None, f"{lease.version} left while {lease.reader.name} reads it"
            assert entry.generation == lease.generation, f"{lease.version} was placed anew under a lease"
            assert entry.offset_bytes == lease.offset_bytes, f"{lease.version} lies elsewhere than its lease says"
            assert lease.deadline_s <= lease.granted_s + self._limits.longest_s, f"{lease.lease_id} lasts too long"
        leased = Counter(lease.version for lease in self._leases.values())
        assert leased == {e.adapter.version: e.leases for e in self._holdings.entries() if e.leases}, "a stray lease"
        assert len(self._leases) <= self._limits.most, "too many leases"
        of_readers = Counter(lease.reader.name for lease in self._leases.values())
        assert all(count <= self._limits.most_a_reader for count in of_readers.values()), "a reader has too many"

    def _grant(self, reader: Reader, read_id: str, version: str, now: float) -> Lease:
        entry = self._holdings.lease(version)
        self._granted += 1
        lease = Lease(
            # Of another life of this engine, or of another slab in the same place, no id is ever the same.
            lease_id=f"{self._region_id}.{entry.generation}.{self._granted}",
            reader=reader,
            read_id=read_id,
            version=version,
            generation=entry.generation,
            offset_bytes=entry.offset_bytes,
            granted_s=now,
            deadline_s=now + min(self._limits.lasts_s, self._limits.longest_s),
        )
        self._leases[lease.lease_id] = lease
        self._tell(lease, now, f"granted to {reader.name} at {lease.offset_bytes}")
        return lease

    def _full(self, version: str, held: int) -> Refused | None:
        limits = self._limits
        if version in self._holdings.awaited:
            return Refused("making_room", f"{version} leaves; read it from another source")
        if held >= limits.most_a_reader or len(self) >= limits.most:
            return Refused(
                "too_many_leases",
                f"this reader has {held} leases of at most {limits.most_a_reader}, all have {len(self)} of at most "
                f"{limits.most}; release some, or read from another source",
            )
        return None

    def _held(self, reader: Reader, lease_id: str, now: float) -> Lease | Refused | None:
        """None where it has ended, or never was."""
        self.expire(now)
        lease = self._leases.get(lease_id)
        if lease is not None and lease.reader != reader:
            return Refused("not_yours", f"lease {lease_id} is another reader's; ask for one of your own")
        return lease

    def _lease_of(self, reader: Reader, read_id: str, version: str) -> Lease | None:
        of_read = (reader, read_id, version)
        every = self._leases.values()
        return next((lease for lease in every if (lease.reader, lease.read_id, lease.version) == of_read), None)

    def _of(self, name: str) -> list[Lease]:
        return [lease for lease in self._leases.values() if lease.reader.name == name]

    def _end(self, lease: Lease, why: str, now: float) -> None:
        del self._leases[lease.lease_id]
        self._holdings.end_lease(lease.version, lease.generation)
        self._ended.append(Ended(lease, why))
        self._tell(lease, now, f"lease of {lease.reader.name} ended: {why}")

    def _tell(self, lease: Lease, now: float, text: str) -> None:
        for subject in (lease.version, lease.lease_id):
            self._story.tell(subject, now, text)


def _unfit(entry: Held | None, version: str, slab_bytes: int) -> Refused:
    if entry is None:
        return Refused("not_found", f"{version} is not here; read it from another source")
    if not entry.is_complete:
        return Refused("loading", f"{version} is still on its way here; read it from another source")
    held = entry.adapter.slab_bytes
    return Refused("mismatch", f"{version} has {held} bytes here, asked for {slab_bytes}; register the adapter again")
