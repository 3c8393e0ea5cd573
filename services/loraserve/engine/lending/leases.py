"""Grants leases to peers. While a peer holds a lease on an extent, the extent is not reused.

A lease ends when it is released, when its deadline passes, or when its reader dies. Renewals extend the deadline up to
a maximum duration. Readers are not told when a lease ends. They verify the bytes that they have read.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Protocol

import msgspec

from loraserve.adapter.format import SlabHeader
from loraserve.messages import AdapterRef
from loraserve.story import Story


class LendableSlab(Protocol):
    """A slab in the pool or in the host cache."""

    @property
    def adapter(self) -> AdapterRef: ...
    @property
    def header(self) -> SlabHeader | None: ...
    @property
    def offset_bytes(self) -> int: ...
    @property
    def generation(self) -> int:
        """The number of the slab's placement, unique within the pool or cache. A reloaded slab has a new one."""
        ...

    @property
    def is_complete(self) -> bool: ...

    @property
    def leases(self) -> int: ...


class LendableSlabs(Protocol):
    """A memory that lends slabs: the pool or the host cache. Leased slabs are not evicted."""

    @property
    def not_lendable(self) -> frozenset[str]:
        """The versions that get no new leases, because they are damaged or must leave the memory."""
        ...

    def get(self, version: str) -> LendableSlab | None: ...
    def entries(self) -> Iterable[LendableSlab]: ...
    def lease(self, version: str) -> LendableSlab:
        """Count one more lease on a slab, which pins it, and return the slab."""
        ...

    def end_lease(self, version: str, generation: int) -> None: ...


class LeaseLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of leases. A lease lasts ``lasts_s`` seconds, and with renewals at most ``longest_s``.

    ``most`` is the maximum number of leases, ``most_a_reader`` the maximum per reader.
    """

    lasts_s: float
    longest_s: float
    most: int = 256
    most_a_reader: int = 16


class LeaseReader(msgspec.Struct, frozen=True):
    """A peer process: its name and its incarnation, an id that changes when the process restarts."""

    name: str
    incarnation: str


class Lease(msgspec.Struct):
    """A lease. ``read_id`` is the reader's id of its read. ``generation`` is the number of the slab's placement."""

    lease_id: str
    reader: LeaseReader
    read_id: str
    version: str
    generation: int
    offset_bytes: int
    granted_s: float
    deadline_s: float


class LeaseRefusal(msgspec.Struct, frozen=True):
    """The refusal of a request. LeaseSlab, RenewLease and ReleaseLease document the values of ``code``."""

    code: str
    message: str


class EndedLease(msgspec.Struct, frozen=True):
    """An ended lease. ``reason`` is ``released``, ``expired`` or ``reader_gone``."""

    lease: Lease
    reason: str


class Leases:
    """The leases on the slabs of one memory region. ``region_id`` is unique, even across restarts of the process."""

    def __init__(self, region_id: str, slabs: LendableSlabs, limits: LeaseLimits, story: Story | None = None) -> None:
        self._region_id = region_id
        self._slabs = slabs
        self._limits = limits
        self._leases: dict[str, Lease] = {}
        self._granted = 0
        self._ended: list[EndedLease] = []
        self.story = story or Story()

    def __len__(self) -> int:
        return len(self._leases)

    def __contains__(self, lease_id: str) -> bool:
        return lease_id in self._leases

    def is_held(self, lease_id: str, reader_name: str, version: str) -> bool:
        lease = self._leases.get(lease_id)
        return lease is not None and (lease.reader.name, lease.version) == (reader_name, version)

    def has_read(self, reader: LeaseReader, read_id: str, version: str) -> bool:
        return self._lease_of_read(reader, read_id, version) is not None

    def grant(
        self, reader: LeaseReader, read_id: str, version: str, slab_bytes: int, now: float
    ) -> Lease | LeaseRefusal:
        """Return the lease that the read already has on the slab, or else a new lease or a refusal."""
        self.expire(now)
        self.end_past_lives(reader, now)
        slab = self._slabs.get(version)
        if slab is None or not slab.is_complete or slab.adapter.slab_bytes != slab_bytes:
            return _refuse_slab(slab, version, slab_bytes)
        known = self._lease_of_read(reader, read_id, version)
        refusal = self._refusal_by_limits(version, len(self._of_reader(reader.name)))
        return known or refusal or self._grant(reader, read_id, version, now)

    def renew(self, reader: LeaseReader, lease_id: str, now: float) -> Lease | LeaseRefusal:
        """Extend a lease to ``lasts_s`` from now, but at most to ``longest_s`` from its grant."""
        lease = self._find_held(reader, lease_id, now)
        if lease is None:
            return LeaseRefusal("expired", f"lease {lease_id} has ended; ask for a new one and read again")
        if isinstance(lease, Lease):
            latest_s = lease.granted_s + self._limits.longest_s
            lease.deadline_s = max(lease.deadline_s, min(now + self._limits.lasts_s, latest_s))
        return lease

    def release(self, reader: LeaseReader, lease_id: str, now: float) -> bool | LeaseRefusal:
        """End a lease. Return False if it had already ended, or a refusal if it is another reader's."""
        lease = self._find_held(reader, lease_id, now)
        if isinstance(lease, LeaseRefusal):
            return lease
        if lease is not None:
            self._end(lease, "released", now)
        return lease is not None

    def end_past_lives(self, reader: LeaseReader, now: float) -> None:
        """End the leases of earlier processes with this reader's name. Those processes are dead."""
        for lease in self._of_reader(reader.name):
            if lease.reader != reader:
                self._end(lease, "reader_gone", now)

    def end_reader(self, reader: LeaseReader, now: float) -> None:
        """End the leases of a dead reader. Leases of a newer process with the same name are kept."""
        for lease in self._of_reader(reader.name):
            if lease.reader == reader:
                self._end(lease, "reader_gone", now)

    def expire(self, now: float) -> None:
        for lease in [lease for lease in self._leases.values() if lease.deadline_s <= now]:
            self._end(lease, "expired", now)

    def take_ended(self) -> list[EndedLease]:
        """Return the leases that have ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def validate(self) -> None:
        """Raise AssertionError if a lease does not match its slab or the limits are exceeded."""
        for lease in self._leases.values():
            slab = self._slabs.get(lease.version)
            assert slab is not None, f"{lease.version} left while {lease.reader.name} reads it"
            assert slab.generation == lease.generation, f"{lease.version} was placed again under a lease"
            assert slab.offset_bytes == lease.offset_bytes, f"{lease.version} is not where its lease says"
            assert lease.deadline_s <= lease.granted_s + self._limits.longest_s, f"{lease.lease_id} lasts too long"
        leased = Counter(lease.version for lease in self._leases.values())
        assert leased == {s.adapter.version: s.leases for s in self._slabs.entries() if s.leases}, "a stray lease"
        assert len(self._leases) <= self._limits.most, "too many leases"
        by_reader = Counter(lease.reader.name for lease in self._leases.values())
        assert all(count <= self._limits.most_a_reader for count in by_reader.values()), "a reader has too many leases"

    def _grant(self, reader: LeaseReader, read_id: str, version: str, now: float) -> Lease:
        slab = self._slabs.lease(version)
        self._granted += 1
        lease = Lease(
            # Unique across restarts of the process and across slabs in the same extent.
            lease_id=f"{self._region_id}.{slab.generation}.{self._granted}",
            reader=reader,
            read_id=read_id,
            version=version,
            generation=slab.generation,
            offset_bytes=slab.offset_bytes,
            granted_s=now,
            deadline_s=now + min(self._limits.lasts_s, self._limits.longest_s),
        )
        self._leases[lease.lease_id] = lease
        self._tell(lease, now, f"leased to {reader.name} at {lease.offset_bytes}")
        return lease

    def _refusal_by_limits(self, version: str, held: int) -> LeaseRefusal | None:
        limits = self._limits
        if version in self._slabs.not_lendable:
            return LeaseRefusal("making_room", f"{version} has to leave; read it from another source")
        if held >= limits.most_a_reader or len(self) >= limits.most:
            return LeaseRefusal(
                "too_many_leases",
                f"this reader has {held} leases of at most {limits.most_a_reader}, all have {len(self)} of at most "
                f"{limits.most}; release some, or read from another source",
            )
        return None

    def _find_held(self, reader: LeaseReader, lease_id: str, now: float) -> Lease | LeaseRefusal | None:
        """Return the reader's lease; None if it has ended or never existed; a refusal if it is another reader's."""
        self.expire(now)
        lease = self._leases.get(lease_id)
        if lease is not None and lease.reader != reader:
            return LeaseRefusal("not_yours", f"lease {lease_id} is another reader's; ask for one of your own")
        return lease

    def _lease_of_read(self, reader: LeaseReader, read_id: str, version: str) -> Lease | None:
        wanted = (reader, read_id, version)
        leases = self._leases.values()
        return next((lease for lease in leases if (lease.reader, lease.read_id, lease.version) == wanted), None)

    def _of_reader(self, name: str) -> list[Lease]:
        return [lease for lease in self._leases.values() if lease.reader.name == name]

    def _end(self, lease: Lease, reason: str, now: float) -> None:
        del self._leases[lease.lease_id]
        self._slabs.end_lease(lease.version, lease.generation)
        self._ended.append(EndedLease(lease, reason))
        self._tell(lease, now, f"lease of {lease.reader.name} ended: {reason}")

    def _tell(self, lease: Lease, now: float, text: str) -> None:
        for subject in (lease.version, lease.lease_id):
            self.story.tell(subject, now, text)


def _refuse_slab(slab: LendableSlab | None, version: str, slab_bytes: int) -> LeaseRefusal:
    if slab is None:
        return LeaseRefusal("not_found", f"{version} is not here; read it from another source")
    if not slab.is_complete:
        return LeaseRefusal("loading", f"{version} is still being loaded here; read it from another source")
    held = slab.adapter.slab_bytes
    message = f"{version} has {held} bytes here, asked for {slab_bytes}; register the adapter again"
    return LeaseRefusal("mismatch", message)
