"""Engine -> engine: leases on an extent, so that it stays where it is while a peer reads it, and complaints."""

from loraserve.messages.base import Message
from loraserve.messages.transfer import Handle


class LeaseSlab(Message, frozen=True, tag=True, kw_only=True):
    """Do not reuse this slab's extent while I read it.

    Answered by LeaseGranted and one raw frame, the slab's encoded header, with which the reader verifies what it read.
    Refused with ``version`` (of ``protocol``, the transfer protocol's), ``not_found``, ``loading``, ``mismatch`` (of
    ``slab_bytes``), ``making_room`` or ``too_many_leases``: another source is to be taken.

    ``read_id`` is the reader's own, new for every read: asked again with it, the owner grants the lease that it has
    granted. A new ``incarnation`` says that the reader's past self is dead: its leases end.
    """

    protocol: int
    incarnation: str
    read_id: str
    version: str
    slab_bytes: int


class LeaseGranted(Message, frozen=True, tag=True, kw_only=True):
    """It lasts ``lasts_s`` from when the reader asked: to the owner, who counts from later on, a little longer.

    The slab lies at ``offset_bytes`` of the region that each of ``handles`` is of; none where nothing is offered.
    """

    lease_id: str
    version: str
    offset_bytes: int
    slab_bytes: int
    lasts_s: float
    handles: tuple[Handle, ...] = ()


class RenewLease(Message, frozen=True, tag=True, kw_only=True):
    """Answered by LeaseRenewed. Refused with ``expired`` where it has ended, ``not_yours`` where another has it."""

    lease_id: str
    incarnation: str


class LeaseRenewed(Message, frozen=True, tag=True, kw_only=True):
    """``lasts_s`` counts from when the reader asked. It shrinks towards the longest that any lease lasts."""

    lease_id: str
    lasts_s: float


class ReleaseLease(Message, frozen=True, tag=True, kw_only=True):
    """The read has ended. Usually sent one-way; a request is answered by LeaseReleased or refused (``not_yours``)."""

    lease_id: str
    incarnation: str


class LeaseReleased(Message, frozen=True, tag=True, kw_only=True):
    """``held`` False: it had ended before, and what was read since may be of another adapter."""

    lease_id: str
    held: bool


class SlabDamaged(Message, frozen=True, tag=True, kw_only=True):
    """What was read under this lease is not what its digest is of, beginning with ``layer``; no answer.

    The owner looks at its own copy: either it is damaged there, or it was on the way.
    """

    version: str
    lease_id: str
    layer: int
