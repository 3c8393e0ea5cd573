"""Any process -> the owner of memory that is read: over the bus, or over a connection that is made over the bus."""

import msgspec

from loraserve.messages.base import Message


class ReadRegion(Message, frozen=True, tag=True, kw_only=True):
    """Answered by RegionChunk and one raw frame of exactly ``length_bytes``. Refused with a code of TransferError.

    ``protocol`` is the transfer protocol's, ``token`` names the region.
    """

    protocol: int
    token: str
    offset_bytes: int
    length_bytes: int


class RegionChunk(Message, frozen=True, tag=True, kw_only=True):
    token: str
    offset_bytes: int


class QueueEnd(msgspec.Struct, frozen=True, kw_only=True):
    """One end of an RDMA connection: all that the other must know of it. ``mtu`` is the verbs enum of it."""

    number: int
    first_packet: int
    gid: str
    lid: int
    mtu: int
    link_layer: str
    reads: int
    """So many it asks for, or serves, at once."""


class ConnectQueue(Message, frozen=True, tag=True, kw_only=True):
    """Answered by QueueConnected when the owner's end is ready to serve. Refused with a code of TransferError.

    ``protocol`` is the transfer protocol's, ``incarnation`` the owner's that gave the handle. ``link`` is the reader's
    name for this connection: another ConnectQueue with the same one replaces it. A new ``reader_incarnation`` says that
    the reader's past self is dead: its connections go.
    """

    protocol: int
    incarnation: str
    link: str
    reader_incarnation: str
    end: QueueEnd


class QueueConnected(Message, frozen=True, tag=True, kw_only=True):
    end: QueueEnd
