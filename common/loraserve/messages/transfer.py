"""Reader -> owner of a memory region: read it. Also defines the handles with which readers reach a region.

An owner registers a region of memory once and sends its handles in other messages such as LeaseGranted. A reader with a
handle reads ranges of the region: directly (``shm``, ``cuda_ipc``), over the bus with ReadRegion (``tcp``), or over an
RDMA connection that ConnectQueue sets up (``verbs``).
"""

from typing import ClassVar, Literal

import msgspec

from loraserve.messages.base import Message

TRANSFER_PROTOCOL_VERSION = 1
"""Version of the handles and of the requests that use them. A process reads only from owners with its version."""

Transport = Literal["cuda_ipc", "shm", "verbs", "tcp"]


class Abilities(msgspec.Struct, frozen=True, kw_only=True):
    """The ways in which a process and its peers can read each other's memory.

    ``host`` is the boot id of the machine. Processes on one host with the same ``neighbourhood`` can open each other's
    memory: they have the same user and namespaces. A neighbourhood "" is unknown and matches no other. ``device`` is
    the location of the adapter pool, ``cpu`` or ``cuda``.
    """

    protocol: int
    host: str
    neighbourhood: str
    transports: tuple[str, ...]
    device: str


class HandleBase(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The fields of every handle. ``owner`` is the bus name of the process that owns the memory."""

    transport: ClassVar[Transport]
    protocol: int
    owner: str
    incarnation: str
    length_bytes: int


class SameHostHandle(HandleBase, frozen=True, kw_only=True, tag=True):
    """Memory of a process on the same machine.

    The handle is valid while process ``pid`` has ``descriptor`` open under ``name``. The name is random, so readers
    detect a reused process id or descriptor number.
    """

    pid: int
    descriptor: int
    name: str


class ShmHandle(SameHostHandle, frozen=True, kw_only=True, tag=True):
    """Shared memory. Readers open the descriptor through /proc."""

    transport: ClassVar[Transport] = "shm"


class CudaIpcHandle(SameHostHandle, frozen=True, kw_only=True, tag=True):
    """GPU memory at ``offset_bytes`` in an allocation. ``gpu`` is the GPU's UUID.

    ``allocation`` is the CUDA IPC handle of the allocation.
    """

    transport: ClassVar[Transport] = "cuda_ipc"
    allocation: bytes
    offset_bytes: int
    gpu: str


class TcpHandle(HandleBase, frozen=True, kw_only=True, tag=True):
    """Memory to read with ReadRegion. ``token`` is random and valid only for this incarnation of the owner."""

    transport: ClassVar[Transport] = "tcp"
    token: str


class VerbsHandle(HandleBase, frozen=True, kw_only=True, tag=True):
    """Memory to read by RDMA. ``base`` is its address and ``key`` its remote key."""

    transport: ClassVar[Transport] = "verbs"
    base: int
    key: int


# A new member needs a new PROTOCOL_VERSION, because older processes refuse messages that contain it.
Handle = ShmHandle | TcpHandle | VerbsHandle | CudaIpcHandle


class ReadRegion(Message, frozen=True, tag=True, kw_only=True):
    """Request: read a range of the region named by ``token``.

    Answered by RegionChunk and one raw frame of ``length_bytes``. Refused with a code of TransferError. ``protocol`` is
    the reader's TRANSFER_PROTOCOL_VERSION.
    """

    protocol: int
    token: str
    offset_bytes: int
    length_bytes: int


class RegionChunk(Message, frozen=True, tag=True, kw_only=True):
    """Answer to ReadRegion. The raw frame contains the bytes."""

    token: str
    offset_bytes: int


class QueueEnd(msgspec.Struct, frozen=True, kw_only=True):
    """The parameters of one end of an RDMA connection that the other end needs.

    ``mtu`` is a value of the verbs enum ``ibv_mtu``. ``reads`` limits the reads that this end issues or serves at once.
    """

    number: int
    first_packet: int
    gid: str
    lid: int
    mtu: int
    link_layer: str
    reads: int


class ConnectQueue(Message, frozen=True, tag=True, kw_only=True):
    """Request: connect the reader's queue pair ``end`` to a new queue pair of the owner.

    Answered by QueueConnected when the owner's end can serve reads. Refused with a code of TransferError.
    ``protocol`` is the reader's TRANSFER_PROTOCOL_VERSION. ``incarnation`` is the owner's, from the handle. ``link``
    names the connection. A later request with the same link replaces it. On a new ``reader_incarnation``, the owner
    closes the reader's earlier connections, because the reader was restarted.
    """

    protocol: int
    incarnation: str
    link: str
    reader_incarnation: str
    end: QueueEnd


class QueueConnected(Message, frozen=True, tag=True, kw_only=True):
    """Answer to ConnectQueue. ``end`` is the owner's queue pair."""

    end: QueueEnd
