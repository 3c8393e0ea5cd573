"""Any process -> the owner of memory that it wants to read; and the handles that owners give away.

An owner registers a region of memory once and sends its handles in other messages (see LeaseGranted). A reader that has
a handle reads ranges of the region: directly (``shm``, ``cuda_ipc``), over the bus (``tcp``, with ReadRegion), or over
an RDMA connection that is made over the bus (``verbs``, with ConnectQueue).
"""

from typing import ClassVar, Literal

import msgspec

from loraserve.messages.base import Message

TRANSFER_PROTOCOL_VERSION = 1
"""Version of the handles and of the requests made with them. Processes of different versions do not read from each
other."""

Transport = Literal["cuda_ipc", "shm", "verbs", "tcp"]


class Abilities(msgspec.Struct, frozen=True, kw_only=True):
    """How a process can read the memory of others, and others can read its own.

    ``host`` is the boot id of the machine. ``neighbourhood`` identifies, within a host, the processes that can open
    each other's memory: those of one user in the same namespaces. "" means unknown and never equals another's.
    ``device`` says where the adapter pool is: ``cpu`` or ``cuda``.
    """

    protocol: int
    host: str
    neighbourhood: str
    transports: tuple[str, ...]
    device: str


class HandleBase(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Fields of every handle. ``owner`` is the owner's name on the bus."""

    transport: ClassVar[Transport]
    protocol: int
    owner: str
    incarnation: str
    length_bytes: int


class SameHostHandle(HandleBase, frozen=True, kw_only=True, tag=True):
    """Memory of a process on the same machine.

    The owner offers the memory for as long as process ``pid`` has ``descriptor`` open under ``name``. The name is
    random, so that a reused process id or descriptor number is recognized as another one.
    """

    pid: int
    descriptor: int
    name: str


class ShmHandle(SameHostHandle, frozen=True, kw_only=True, tag=True):
    """Shared memory: the descriptor is the memory itself and is opened through /proc."""

    transport: ClassVar[Transport] = "shm"


class CudaIpcHandle(SameHostHandle, frozen=True, kw_only=True, tag=True):
    """GPU memory, ``offset_bytes`` into the allocation that ``allocation`` (a CUDA IPC handle) opens.

    ``gpu`` is the GPU's UUID.
    """

    transport: ClassVar[Transport] = "cuda_ipc"
    allocation: bytes
    offset_bytes: int
    gpu: str


class TcpHandle(HandleBase, frozen=True, kw_only=True, tag=True):
    """Memory that is read with ReadRegion. ``token`` is random and valid for this incarnation of the owner only."""

    transport: ClassVar[Transport] = "tcp"
    token: str


class VerbsHandle(HandleBase, frozen=True, kw_only=True, tag=True):
    """Memory that is read by RDMA. ``key`` is the remote key of the memory at address ``base``."""

    transport: ClassVar[Transport] = "verbs"
    base: int
    key: int


# A process that does not know a member refuses the whole message: adding one needs a new PROTOCOL_VERSION.
Handle = ShmHandle | TcpHandle | VerbsHandle | CudaIpcHandle


class ReadRegion(Message, frozen=True, tag=True, kw_only=True):
    """Request: read a range of the region named by ``token``.

    Answered by RegionChunk and one raw frame of exactly ``length_bytes``. Refused with a code of TransferError.
    ``protocol`` is the reader's TRANSFER_PROTOCOL_VERSION.
    """

    protocol: int
    token: str
    offset_bytes: int
    length_bytes: int


class RegionChunk(Message, frozen=True, tag=True, kw_only=True):
    """Answer to ReadRegion; the bytes are in the raw frame beside it."""

    token: str
    offset_bytes: int


class QueueEnd(msgspec.Struct, frozen=True, kw_only=True):
    """One end of an RDMA connection, as the other end needs to know it.

    ``mtu`` is a value of the verbs enum ``ibv_mtu``. ``reads`` is how many reads this end asks for, or serves, at once.
    """

    number: int
    first_packet: int
    gid: str
    lid: int
    mtu: int
    link_layer: str
    reads: int


class ConnectQueue(Message, frozen=True, tag=True, kw_only=True):
    """Request: connect the reader's queue pair ``end`` to a new one of the owner.

    Answered by QueueConnected when the owner's end can serve reads. Refused with a code of TransferError.
    ``protocol`` is the reader's TRANSFER_PROTOCOL_VERSION and ``incarnation`` the owner's, from the handle. ``link`` is
    the reader's name for the connection: a second ConnectQueue with the same link replaces the first. A new
    ``reader_incarnation`` tells the owner that the reader was restarted, and closes its earlier connections.
    """

    protocol: int
    incarnation: str
    link: str
    reader_incarnation: str
    end: QueueEnd


class QueueConnected(Message, frozen=True, tag=True, kw_only=True):
    """Answer to ConnectQueue: the owner's end."""

    end: QueueEnd
