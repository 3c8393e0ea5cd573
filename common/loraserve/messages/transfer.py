"""Any process -> the owner of memory that is read over the bus."""

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
