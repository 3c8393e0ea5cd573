"""Leases: promises to peers that an extent of the pool is not used for anything else while they read it. Pure.

A lease ends by its release, by its deadline, or with its reader; renewals put the deadline off, but not for ever. What
ends tells nobody: whoever read until then verifies what it has.
"""

from collections import Counter

import msgspec

from loraserve.engine.pool import AdapterPool, Entry
from loraserve.engine.story import Story


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
    """``read_id`` is the reader's own for what it is doing; ``generation`` is the pool entry's."""

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
    """Who reads what of one pool. Nothing in the pool leaves while a lease is on it; see ``AdapterPool.place``."""

    def __init__(self, owner_incarnation: str, pool: AdapterPool, limits: LeaseLimits) -> None:
        self._owner_incarnation = owner_incarnation
        self._pool = pool
        self._limits = limits
        self._leases: dict[str, Lease] = {}
        self._granted = 0
        self._ended: list[Ended] = []
        self._story = Story()

    def __len__(self) -> int:
        return len(self._leases)

    def grant(self, reader: Reader, read_id: str, version: str, slab_bytes: int, now: float) -> Lease | Refused:
        """A lease on a resident slab; the one that this read has already where it asks again.

        What the reader's past self had ends, for that one is dead.
        """
        self.expire(now)
        for lease in self._of(reader.name):
            if lease.reader != reader:
                self._end(lease, "reader_gone", now)
        entry = self._pool.get(version)
        if entry is None or not entry.resident or entry.adapter.slab_bytes != slab_bytes:
            return _unfit(entry, version, slab_bytes)
        held = self._of(reader.name)
        again = next((lease for lease in held if (lease.read_id, lease.version) == (read_id, version)), None)
        return again or self._full(entry, len(held)) or self._grant(reader, read_id, version, now)

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

    def reader_gone(self, name: str, now: float) -> None:
        """It died: it reads nothing any more."""
        for lease in self._of(name):
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
        return self._story.of(subject)

    def validate(self) -> None:
        """Each is on the very entry that it was granted for, nothing else is leased, and the bounds hold."""
        for lease in self._leases.values():
            entry = self._pool.get(lease.version)
            assert entry is not None, f"{lease.version} left while {lease.reader.name} reads it"
            assert entry.generation == lease.generation, f"{lease.version} was placed anew under a lease"
            assert entry.offset_bytes == lease.offset_bytes, f"{lease.version} lies elsewhere than its lease says"
            assert lease.deadline_s <= lease.granted_s + self._limits.longest_s, f"{lease.lease_id} lasts too long"
        leased = Counter(lease.version for lease in self._leases.values())
        assert leased == {e.adapter.version: e.leases for e in self._pool.entries() if e.leases}, "a stray lease"
        assert len(self._leases) <= self._limits.most, "too many leases"
        of_readers = Counter(lease.reader.name for lease in self._leases.values())
        assert all(count <= self._limits.most_a_reader for count in of_readers.values()), "a reader has too many"

    def _grant(self, reader: Reader, read_id: str, version: str, now: float) -> Lease:
        entry = self._pool.lease(version)
        self._granted += 1
        lease = Lease(
            # Of another life of this engine, or of another slab in the same place, no id is ever the same.
            lease_id=f"{self._owner_incarnation}.{entry.generation}.{self._granted}",
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

    def _full(self, entry: Entry, held: int) -> Refused | None:
        version, limits = entry.adapter.version, self._limits
        if version in self._pool.awaited:
            return Refused("making_room", f"{version} leaves this pool; read it from another source")
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

    def _of(self, name: str) -> list[Lease]:
        return [lease for lease in self._leases.values() if lease.reader.name == name]

    def _end(self, lease: Lease, why: str, now: float) -> None:
        del self._leases[lease.lease_id]
        self._pool.end_lease(lease.version, lease.generation)
        self._ended.append(Ended(lease, why))
        self._tell(lease, now, f"lease of {lease.reader.name} ended: {why}")

    def _tell(self, lease: Lease, now: float, text: str) -> None:
        for subject in (lease.version, lease.lease_id):
            self._story.tell(subject, now, text)


def _unfit(entry: Entry | None, version: str, slab_bytes: int) -> Refused:
    if entry is None:
        return Refused("not_found", f"{version} is not in this pool; read it from another source")
    if not entry.resident:
        return Refused("loading", f"{version} is on its way to this pool itself; read it from another source")
    held = entry.adapter.slab_bytes
    return Refused("mismatch", f"{version} has {held} bytes here, asked for {slab_bytes}; register the adapter again")
