"""Engine -> engine: lease an adapter, so that it stays in place while a peer reads it, or report a damaged copy."""

from loraserve.messages.base import Message
from loraserve.messages.transfer import Handle


class LeaseSlab(Message, frozen=True, tag=True, kw_only=True):
    """Request of a reader: keep this slab in place while the reader reads it.

    Answered by LeaseGranted and one raw frame, the slab's encoded header, with which the reader verifies the bytes.
    Refused with ``version`` (unequal ``protocol``), ``not_found``, ``loading``, ``mismatch`` (of ``slab_bytes``),
    ``making_room`` (the slab will be evicted) or ``too_many_leases``. The reader then uses another source.

    Each read has its own ``read_id``, so a repeated request gets the same lease. ``incarnation`` is the reader's. On a
    new value, the owner ends the reader's earlier leases, because the reader was restarted.
    """

    protocol: int
    incarnation: str
    read_id: str
    version: str
    slab_bytes: int


class LeaseGranted(Message, frozen=True, tag=True, kw_only=True):
    """Answer to LeaseSlab. The lease lasts ``lasts_s``, counted from the request.

    The slab begins at ``offset_bytes`` in the region of each handle. Without handles, the reader cannot read it.
    """

    lease_id: str
    version: str
    offset_bytes: int
    slab_bytes: int
    lasts_s: float
    handles: tuple[Handle, ...] = ()


class RenewLease(Message, frozen=True, tag=True, kw_only=True):
    """Request: extend a lease. Answered by LeaseRenewed. Refused with ``expired`` or ``not_yours``."""

    lease_id: str
    incarnation: str


class LeaseRenewed(Message, frozen=True, tag=True, kw_only=True):
    """Answer to RenewLease. ``lasts_s`` is counted from the request. It is shorter near the lease's maximum age."""

    lease_id: str
    lasts_s: float


class ReleaseLease(Message, frozen=True, tag=True, kw_only=True):
    """End a lease after a read. Usually sent one-way. A request is answered by LeaseReleased, even if repeated.

    Refused with ``not_yours`` if another reader has the lease.
    """

    lease_id: str
    incarnation: str


class LeaseReleased(Message, frozen=True, tag=True, kw_only=True):
    """Answer to ReleaseLease. If ``held`` is False, the lease had ended and the bytes read may be another adapter's."""

    lease_id: str
    held: bool


class SlabDamaged(Message, frozen=True, tag=True, kw_only=True):
    """Reports that the bytes read under a lease do not match their digests, first in ``layer``. No answer.

    The owner then verifies its own copy, to find out whether the copy or only the transferred bytes are damaged.
    """

    version: str
    lease_id: str
    layer: int
