"""The common part of all transports: errors, byte ranges, the reader's interface, and the checks before a read.

Handles are messages (see messages/transfer.py). A transport guarantees only that the owner offered the memory when the
read began and when it ended. A lease guarantees that the owner does not reuse the memory during the read. The caller
verifies the bytes with their digests.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol, TypeVar, get_args

import msgspec

from loraserve.errors import LoraServeError
from loraserve.messages.transfer import TRANSFER_PROTOCOL_VERSION, Abilities, Handle, HandleBase, Transport

Code = Literal["gone", "out_of_range", "version", "refused", "timeout", "size"]

KindT = TypeVar("KindT", bound=HandleBase)


class TransferError(LoraServeError):
    """A read failed. The destination buffer then holds undefined bytes.

    ``code`` is stable for programs: ``gone`` (the owner died or withdrew the memory; use the next source),
    ``out_of_range``, ``version`` (the owner uses another transfer protocol), ``refused`` (not allowed, or not possible
    with this transport), ``timeout``, ``size`` (the buffer or an answer differs in size from the ranges). ``message``
    names the owner, the request and the remedy.
    """

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code: Code = code
        self.message = message


class ByteRange(msgspec.Struct, frozen=True):
    """A range of bytes in a region."""

    offset_bytes: int
    length_bytes: int


class RegionReader(Protocol):
    """The reader's side of a transport. Reads may run concurrently, each into its own buffer."""

    async def read(self, handle: Handle, ranges: Sequence[ByteRange], into: memoryview) -> None:
        """Read the ranges into ``into``, where they follow each other without gaps. Raises TransferError.

        After this returns, raises or is cancelled, nothing writes to ``into`` any more.
        """
        ...

    def close(self) -> None:
        """Release the mappings of, and connections to, peers. No read may be in progress."""
        ...


def choose_transports(mine: Abilities, theirs: Abilities, preferred: Sequence[Transport]) -> tuple[Transport, ...]:
    """Return the transports of ``preferred`` that work between the two processes, in the order of ``preferred``."""
    if not mine.protocol == theirs.protocol == TRANSFER_PROTOCOL_VERSION:
        return ()
    common = [each for each in preferred if each in mine.transports and each in theirs.transports]
    return tuple(each for each in common if _connects(each, mine, theirs))


def _connects(transport: Transport, mine: Abilities, theirs: Abilities) -> bool:
    match transport:
        case "shm":
            return _are_neighbours(mine, theirs)
        case "cuda_ipc":
            return _are_neighbours(mine, theirs) and mine.device == theirs.device == "cuda"
        case "verbs" | "tcp":
            return True


def _are_neighbours(mine: Abilities, theirs: Abilities) -> bool:
    here = (mine.host, mine.neighbourhood)
    return all(here) and here == (theirs.host, theirs.neighbourhood)


def check_read(
    handle: HandleBase, kind: type[KindT], ranges: Sequence[ByteRange], into: memoryview
) -> tuple[KindT, memoryview]:
    """Return the handle as ``kind`` and ``into`` as a byte view. Raises TransferError if the read is impossible."""
    return check_handle(handle, kind, ranges), _as_bytes(handle, into, sum([each.length_bytes for each in ranges]))


def check_handle(handle: HandleBase, kind: type[KindT], ranges: Sequence[ByteRange]) -> KindT:
    """Return the handle as ``kind``. Raises TransferError if the ranges cannot be read with it."""
    if handle.protocol != TRANSFER_PROTOCOL_VERSION:
        raise TransferError(
            "version",
            f"{describe(handle, 'a read')}: its handle has transfer protocol {handle.protocol}, this process uses "
            f"{TRANSFER_PROTOCOL_VERSION}; run the same release everywhere",
        )
    if not isinstance(handle, kind):
        raise TransferError(
            "refused",
            f"{describe(handle, 'a read')}: this reader handles {kind.transport} only; use the reader for "
            f"{handle.transport}",
        )
    check_ranges(handle, ranges)
    return handle


def check_ranges(handle: HandleBase, ranges: Sequence[ByteRange]) -> None:
    """Raise TransferError if a range is not completely inside the region."""
    for each in ranges:
        start, length = each.offset_bytes, each.length_bytes
        if start < 0 or length < 0 or start + length > handle.length_bytes:
            raise TransferError(
                "out_of_range",
                f"{describe(handle, f'{length} bytes at {start}')}: not inside the region; ask the owner for the "
                "current location",
            )


def check_protocol(owner: str, protocol: int) -> None:
    """Raise TransferError if ``protocol``, the version in a reader's request to ``owner``, is not this process's."""
    if protocol != TRANSFER_PROTOCOL_VERSION:
        raise TransferError(
            "version",
            f"{owner} uses transfer protocol {TRANSFER_PROTOCOL_VERSION}, the reader {protocol}; run the same release "
            "everywhere",
        )


def withdrawn_error(owner: str) -> TransferError:
    """Return the error with which ``owner`` answers a request for memory it does not know."""
    return TransferError(
        "gone", f"{owner} does not offer this memory any more, or was restarted since; use another source"
    )


def describe(handle: HandleBase, what: str) -> str:
    """Return the beginning of an error message. It names the request ``what``, the owner and the transport."""
    return f"{what} of {handle.owner}'s {handle.length_bytes} bytes over {handle.transport}"


def code_of_refusal(code: str) -> Code:
    """Return ``code``, from a peer's refusal, if it is a code of TransferError, otherwise ``refused``."""
    return next((each for each in get_args(Code) if each == code), "refused")


def split_ranges(ranges: Sequence[ByteRange], piece_bytes: int) -> Iterator[tuple[int, ByteRange]]:
    """Split the ranges into pieces of at most ``piece_bytes``; yield each with its offset in the destination."""
    at_bytes = 0
    for each in ranges:
        end = each.offset_bytes + each.length_bytes
        for start in range(each.offset_bytes, end, piece_bytes):
            length = min(piece_bytes, end - start)
            yield at_bytes, ByteRange(start, length)
            at_bytes += length


def _as_bytes(handle: HandleBase, into: memoryview, wanted_bytes: int) -> memoryview:
    if into.nbytes != wanted_bytes:
        raise TransferError(
            "size",
            f"{describe(handle, f'{wanted_bytes} bytes')}: the buffer has {into.nbytes} bytes; pass one of the size "
            "of the ranges",
        )
    if into.readonly or not into.c_contiguous:
        raise TransferError(
            "refused", f"{describe(handle, f'{wanted_bytes} bytes')}: the buffer is read-only or not contiguous"
        )
    # An empty memoryview cannot be cast.
    return into.cast("B") if wanted_bytes else memoryview(bytearray())
