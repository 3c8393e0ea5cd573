"""The owner's side of RDMA reads.

Only connected peers can use a memory key, and connections are made over the bus. So closing a peer's connection ends
its access (``forget``), and deregistering the memory ends the access of all peers (``close``).
"""

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from loraserve.bus.protocol import Bus, Envelope
from loraserve.messages import ConnectQueue, QueueConnected, QueueEnd
from loraserve.messages.transfer import TRANSFER_PROTOCOL_VERSION, VerbsHandle
from loraserve.threads import run_in_thread
from loraserve.transfer.protocol import TransferError, check_protocol, withdrawn_error
from loraserve.transfer.verbs.device import Memory, RdmaDevice, RegisteredMemory, verbs_errors
from loraserve.transfer.verbs.queue import Completions, QueuePair

SERVED = 1024
"""Maximum number of connections. Beyond it, the oldest is closed; its reader reconnects at its next read."""


class _Connection:
    """The connection to one incarnation of a reader. ``pair`` is None until the queue pair is created."""

    def __init__(self, peer: str, incarnation: str) -> None:
        self.peer = peer
        self.incarnation = incarnation
        self.given_up = False
        self.pair: QueuePair | None = None

    def close(self) -> None:
        self.given_up = True
        if self.pair is not None:
            self.pair.close()


class VerbsExporter:
    """The owner's side of verbs. A region is host or GPU memory. Pass ConnectQueue requests to ``answer``.

    ``register`` blocks: call it when the process starts or in a thread.
    """

    def __init__(self, bus: Bus, device: RdmaDevice) -> None:
        self._bus = bus
        self._device = device
        self._completions = Completions(device, 1)
        self._places: list[RegisteredMemory] = []
        self._served: OrderedDict[tuple[str, str], _Connection] = OrderedDict()
        self._connecting: list[_Connection] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="verbs")

    def register(self, region: Memory) -> VerbsHandle:
        place = self._device.readable(region)
        self._places.append(place)
        return VerbsHandle(
            protocol=TRANSFER_PROTOCOL_VERSION,
            owner=self._bus.name,
            incarnation=self._bus.incarnation,
            length_bytes=place.length_bytes,
            base=place.base,
            key=place.remote_key,
        )

    async def answer(self, envelope: Envelope) -> None:
        """Connect the reader that sent a ConnectQueue request, or refuse the request."""
        request: ConnectQueue = envelope.message
        connection = _Connection(envelope.sender, request.reader_incarnation)
        try:
            end = await self._make(connection, request)
        except TransferError as error:
            self._bus.refuse(envelope, error.code, error.message)
            return
        self._serve((envelope.sender, request.link), connection)
        self._bus.respond(envelope, QueueConnected(end=end))

    def forget(self, peer: str, incarnation: str = "") -> None:
        """Close the connections of a peer, or of one incarnation if given. The peer may connect again."""
        self._drop(lambda each: each.peer == peer and incarnation in ("", each.incarnation))

    @property
    def serving(self) -> int:
        return len(self._served)

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        # Deregister the memory first, so that reads in flight fail at once instead of timing out.
        while self._places:
            self._places.pop().close()
        while self._served:
            self._served.popitem()[1].close()
        self._completions.close()

    def _drop(self, dead: Callable[[_Connection], bool]) -> None:
        for key in [key for key, each in self._served.items() if dead(each)]:
            self._served.pop(key).close()
        for each in filter(dead, self._connecting):
            # A thread is creating the queue pair; _make closes it afterwards.
            each.given_up = True

    async def _make(self, connection: _Connection, request: ConnectQueue) -> QueueEnd:
        """Connect a queue pair to the reader and return its QueueEnd. If this fails, close the queue pair."""
        self._check(request)
        self._connecting.append(connection)
        try:
            end = await run_in_thread(self._thread, partial(self._connect, connection, request.end))
            # The memory may have been withdrawn in the meantime.
            self._check(request)
            if connection.given_up:
                raise TransferError("gone", f"{self._bus.name} was told that {connection.peer} is gone; ask again")
        except BaseException:
            connection.close()
            raise
        finally:
            self._connecting.remove(connection)
        return end

    def _check(self, request: ConnectQueue) -> None:
        name, mine = self._bus.name, self._device.port.link_layer
        check_protocol(name, request.protocol)
        if request.incarnation != self._bus.incarnation or not self._places:
            raise withdrawn_error(name)
        if request.end.link_layer != mine:
            raise TransferError(
                "refused", f"{name}'s RDMA device uses {mine}, not {request.end.link_layer}; use another transport"
            )

    def _connect(self, connection: _Connection, peer: QueueEnd) -> QueueEnd:
        try:
            connection.pair = QueuePair(self._device, self._completions, depth=1, served=True)
            connection.pair.connect(peer)
        except verbs_errors() as error:
            raise TransferError(
                "refused", f"{self._bus.name} cannot connect to {peer.gid}: {error}; use another transport"
            ) from error
        return connection.pair.end

    def _serve(self, key: tuple[str, str], connection: _Connection) -> None:
        peer, incarnation = connection.peer, connection.incarnation
        self._drop(lambda each: each.peer == peer and each.incarnation != incarnation)
        if key in self._served:
            self._served.pop(key).close()
        self._served[key] = connection
        while len(self._served) > SERVED:
            self._served.popitem(last=False)[1].close()
