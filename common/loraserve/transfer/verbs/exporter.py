"""The owner's side of reads by RDMA.

A key alone opens nothing: only who is connected can use it, and connections are made over the bus. So what a peer was
given is void as soon as its connection is (``forget``), and for everybody when the memory is deregistered (``close``).
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
"""Connections of peers; beyond, the oldest goes, and is made anew when it is read over again."""


class _Connection:
    """Of a reader in one of its lives; ``pair`` once it is made."""

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
    """See Exporter; a region is host memory or a GPU's. ConnectQueue that its process receives goes to ``answer``.

    ``register`` blocks: it belongs where the process starts, or in a thread.
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
        """What cannot be connected is refused."""
        request: ConnectQueue = envelope.message
        connection = _Connection(envelope.sender, request.reader_incarnation)
        try:
            end = await self._made(connection, request)
        except TransferError as error:
            self._bus.refuse(envelope, error.code, error.message)
            return
        self._serve((envelope.sender, request.link), connection)
        self._bus.respond(envelope, QueueConnected(end=end))

    def forget(self, peer: str, incarnation: str = "") -> None:
        """In that life, or in any, it can read nothing any more, unless it connects again."""
        self._drop(lambda each: each.peer == peer and incarnation in ("", each.incarnation))

    @property
    def serving(self) -> int:
        """How many connections of peers there are."""
        return len(self._served)

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        # In this order: who reads still is told that the memory is gone, and need not wait for an answer.
        while self._places:
            self._places.pop().close()
        while self._served:
            self._served.popitem()[1].close()
        self._completions.close()

    def _drop(self, dead: Callable[[_Connection], bool]) -> None:
        for key in [key for key, each in self._served.items() if dead(each)]:
            self._served.pop(key).close()
        for each in filter(dead, self._connecting):
            # Its pair is being made in a thread: who waits for that closes it.
            each.given_up = True

    async def _made(self, connection: _Connection, request: ConnectQueue) -> QueueEnd:
        """However this fails, nothing is left of it."""
        self._check(request)
        self._connecting.append(connection)
        try:
            end = await run_in_thread(self._thread, partial(self._connect, connection, request.end))
            # Much may have happened meanwhile.
            self._check(request)
            if connection.given_up:
                raise TransferError("gone", f"{self._bus.name} heard that {connection.peer} is gone; ask again")
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
                "refused", f"{name}'s RDMA device is of {mine}, not of {request.end.link_layer}; use another transport"
            )

    def _connect(self, connection: _Connection, peer: QueueEnd) -> QueueEnd:
        try:
            connection.pair = QueuePair(self._device, self._completions.queue, depth=1, served=True)
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
