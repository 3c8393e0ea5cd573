"""Engine -> engine: leases, which keep an adapter in place while a peer reads it; reports of damaged copies."""

from loraserve.messages.base import Message
from loraserve.messages.transfer import Handle


class LeaseSlab(Message, frozen=True, tag=True, kw_only=True):
    """Request: keep this slab in place while I read it.

    Answered by LeaseGranted and one raw frame, the slab's encoded header, with which the reader verifies the bytes.
    Refused with ``version`` (another transfer ``protocol``), ``not_found``, ``loading``, ``mismatch`` (of
    ``slab_bytes``), ``making_room`` or ``too_many_leases``; the reader then takes another source.

    ``read_id`` is new for every read of this reader. A repeated request with the same id gets the same lease. A new
    ``incarnation`` tells the owner that the reader was restarted, and ends its earlier leases.
    """

    protocol: int
    incarnation: str
    read_id: str
    version: str
    slab_bytes: int


class LeaseGranted(Message, frozen=True, tag=True, kw_only=True):
    """Answer to LeaseSlab. The lease lasts ``lasts_s`` from the time of the request.

    The slab is at ``offset_bytes`` of the region of each handle. Without handles it cannot be read.
    """

    lease_id: str
    version: str
    offset_bytes: int
    slab_bytes: int
    lasts_s: float
    handles: tuple[Handle, ...] = ()


class RenewLease(Message, frozen=True, tag=True, kw_only=True):
    """Request. Answered by LeaseRenewed. Refused with ``expired``, or with ``not_yours`` if another reader has it."""

    lease_id: str
    incarnation: str


class LeaseRenewed(Message, frozen=True, tag=True, kw_only=True):
    """Answer to RenewLease. ``lasts_s`` counts from the request, and shrinks towards the end of the longest lease."""

    lease_id: str
    lasts_s: float


class ReleaseLease(Message, frozen=True, tag=True, kw_only=True):
    """Ends a lease after a read; usually one-way. A request is answered by LeaseReleased, also if repeated.

    Refused with ``not_yours``.
    """

    lease_id: str
    incarnation: str


class LeaseReleased(Message, frozen=True, tag=True, kw_only=True):
    """Answer to ReleaseLease. If not ``held``, the lease ended earlier and the bytes read may be another adapter's."""

    lease_id: str
    held: bool


class SlabDamaged(Message, frozen=True, tag=True, kw_only=True):
    """Reports that bytes read under this lease do not match their digests, from ``layer`` on. No answer.

    The owner verifies its own copy: either that is damaged, or the bytes were damaged on the way.
    """

    version: str
    lease_id: str
    layer: int
