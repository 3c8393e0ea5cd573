"""What all transports share: handles, ranges, errors, and the checks that come before a byte is written.

An owner registers a region once and gives its handle away over the bus; whoever has the handle reads ranges of the
region into memory of its own. What lies there meanwhile is the owner's promise (a lease), and that the bytes are the
right ones is the digest's: a transport only says that the memory was there when the read began and when it ended.
"""

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal, Protocol, TypeVar, get_args

import msgspec

from loraserve.errors import LoraServeError

PROTOCOL = 1
"""Of handles and of what is asked with them; processes of different versions do not read from each other."""

Transport = Literal["cuda_ipc", "shm", "verbs", "tcp"]
Code = Literal["gone", "out_of_range", "version", "refused", "timeout", "size"]


class TransferError(LoraServeError):
    """A read that did not take place, or not whole; what ``into`` holds then is undefined.

    ``code`` is for programs: ``gone`` (the owner died or withdrew the memory: take the next source), ``out_of_range``,
    ``version`` (another protocol), ``refused`` (not allowed, or not by this transport), ``timeout``, ``size`` (``into``
    or an answer of another size than the ranges). The message names the owner, what was asked and the remedy.
    """

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code: Code = code
        self.message = message


class HandleBase(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What every handle says. It is no secret of its own: whoever can read it is a process of this cluster."""

    transport: ClassVar[Transport]
    protocol: int
    owner: str
    """Name of the process on the bus."""
    incarnation: str
    length_bytes: int


class NearHandle(HandleBase, frozen=True, kw_only=True, tag=True):
    """Of a process of this machine, which offers the memory as long as it holds a descriptor of this name.

    ``name`` is unguessable: a number of a process or descriptor that was reused differs.
    """

    pid: int
    descriptor: int
    name: str


class ShmHandle(NearHandle, frozen=True, kw_only=True, tag=True):
    """The descriptor is the memory, and is opened through /proc."""

    transport: ClassVar[Transport] = "shm"


class CudaIpcHandle(NearHandle, frozen=True, kw_only=True, tag=True):
    """Of a GPU's memory, ``offset_bytes`` into the allocation that ``allocation`` opens; ``gpu`` is its UUID."""

    transport: ClassVar[Transport] = "cuda_ipc"
    allocation: bytes
    offset_bytes: int
    gpu: str


class TcpHandle(HandleBase, frozen=True, kw_only=True, tag=True):
    """Asked for over the bus; ``token`` is unguessable and dies with the owner's incarnation."""

    transport: ClassVar[Transport] = "tcp"
    token: str


class VerbsHandle(HandleBase, frozen=True, kw_only=True, tag=True):
    """Read by RDMA over a connection to the owner. ``key`` opens the memory at ``base``, until the owner voids it."""

    transport: ClassVar[Transport] = "verbs"
    base: int
    key: int


# Further transports join here; who does not know a member refuses the message, so PROTOCOL_VERSION grows with it.
Handle = ShmHandle | TcpHandle | VerbsHandle | CudaIpcHandle


class Range(msgspec.Struct, frozen=True):
    """Bytes of a region."""

    offset_bytes: int
    length_bytes: int


RegionT = TypeVar("RegionT", contravariant=True)
HandleT = TypeVar("HandleT", bound=HandleBase, covariant=True)
KindT = TypeVar("KindT", bound=HandleBase)


class Exporter(Protocol[RegionT, HandleT]):
    """The owner's side of a transport. What a region is differs: host memory, shared memory, a GPU's."""

    def register(self, region: RegionT) -> HandleT:
        """Lets peers read the region until ``close``."""
        ...

    def close(self) -> None:
        """Withdraws every handle: new reads fail with ``gone``; the memory stays the owner's."""
        ...


class Reader(Protocol):
    """The other side. Reads may run side by side, also of one region, into memory of their own each."""

    async def read(self, handle: Handle, ranges: Sequence[Range], into: memoryview) -> None:
        """Fills ``into`` with the ranges, one after another. Raises TransferError.

        However this ends (also cancelled) nothing writes to ``into`` any more afterwards.
        """
        ...

    def close(self) -> None:
        """Lets go of everything that belongs to peers. No read may be under way."""
        ...


def known_code(code: str) -> Code:
    """A peer's word for why it refused."""
    return next((each for each in get_args(Code) if each == code), "refused")


def check_protocol(owner: str, protocol: int) -> None:
    """Raises TransferError where ``owner`` is asked in another protocol than this process's."""
    if protocol != PROTOCOL:
        raise TransferError(
            "version",
            f"{owner} speaks transfer protocol {PROTOCOL}, asked in {protocol}; run the same release everywhere",
        )


def withdrawn(owner: str) -> TransferError:
    """What ``owner`` says of memory under a handle that it does not know."""
    return TransferError(
        "gone", f"{owner} does not offer this memory any more, or not since it started; use another source"
    )


def asked(handle: HandleBase, what: str) -> str:
    """The beginning of an error: whose memory, and what was wanted of it."""
    return f"{what} of {handle.owner}'s {handle.length_bytes} bytes over {handle.transport}"


def checked(
    handle: HandleBase, kind: type[KindT], ranges: Sequence[Range], into: memoryview
) -> tuple[KindT, memoryview]:
    """The handle as this transport's, and ``into`` as plain bytes. Raises TransferError for a read that cannot be."""
    mine = checked_handle(handle, kind, ranges)
    return mine, _as_bytes(handle, into, sum([each.length_bytes for each in ranges]))


def checked_handle(handle: HandleBase, kind: type[KindT], ranges: Sequence[Range]) -> KindT:
    """The same for a read whose target is no memory of the host's."""
    if handle.protocol != PROTOCOL:
        raise TransferError(
            "version",
            f"{asked(handle, 'a read')}: its handle is of transfer protocol {handle.protocol}, this process speaks "
            f"{PROTOCOL}; run the same release everywhere",
        )
    if not isinstance(handle, kind):
        raise TransferError(
            "refused", f"{asked(handle, 'a read')}: this reader is for {kind.transport} alone; use the handle's own"
        )
    check_ranges(handle, ranges)
    return handle


def check_ranges(handle: HandleBase, ranges: Sequence[Range]) -> None:
    """Raises TransferError where a range is not wholly within the region."""
    for each in ranges:
        start, length = each.offset_bytes, each.length_bytes
        if start < 0 or length < 0 or start + length > handle.length_bytes:
            raise TransferError(
                "out_of_range",
                f"{asked(handle, f'{length} bytes at {start}')}: not within them; ask the owner where it lies now",
            )


def _as_bytes(handle: HandleBase, into: memoryview, wanted_bytes: int) -> memoryview:
    if into.nbytes != wanted_bytes:
        raise TransferError(
            "size",
            f"{asked(handle, f'{wanted_bytes} bytes')}: the buffer for them has {into.nbytes}; give one of their size",
        )
    if into.readonly or not into.c_contiguous:
        raise TransferError(
            "refused", f"{asked(handle, f'{wanted_bytes} bytes')}: the buffer for them is read-only or has gaps"
        )
    # What is empty cannot be cast.
    return into.cast("B") if wanted_bytes else memoryview(bytearray())


def pieces(ranges: Sequence[Range], piece_bytes: int) -> Iterator[tuple[int, Range]]:
    """The ranges cut into pieces of at most ``piece_bytes``, each with where in ``into`` it goes."""
    at_bytes = 0
    for each in ranges:
        end = each.offset_bytes + each.length_bytes
        for start in range(each.offset_bytes, end, piece_bytes):
            length = min(piece_bytes, end - start)
            yield at_bytes, Range(start, length)
            at_bytes += length
