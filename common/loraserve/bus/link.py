"""ZeroMQ sockets with their safety settings, and the connection to one peer's inbox."""

import asyncio
from collections.abc import Callable, Sequence

import zmq
from zmq.utils.monitor import parse_monitor_message

from loraserve.bus.endpoint import Backlog
from loraserve.bus.protocol import Frame
from loraserve.bus.wire import Parts

LINGER_MS = 200
HEARTBEAT_INTERVAL_MS = 2_000
HEARTBEAT_TIMEOUT_MS = 6_000
RECONNECT_MS = 50
LONGEST_RECONNECT_MS = 1_000
MAX_SOCKETS = 16_384

Socket = zmq.Socket[bytes]
SocketContext = zmq.Context[Socket]


def make_context() -> SocketContext:
    context: SocketContext = zmq.Context()
    context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
    return context


def inbox_socket(context: SocketContext, address: str, queue_messages: int) -> Socket:
    """Where a process listens. Raises zmq.ZMQError when the address is taken."""
    socket = _socket(context, zmq.ROUTER, address, queue_messages)
    # A peer that reconnects before its old connection is noticed dead takes over at once.
    socket.set(zmq.ROUTER_HANDOVER, 1)
    # An answer to a peer that is gone is an error to count, not silence.
    socket.set(zmq.ROUTER_MANDATORY, 1)
    return _bound(socket, address)


def outbox_socket(context: SocketContext, address: str, queue_messages: int, hello: bytes) -> Socket:
    """The connection to one peer's inbox, not yet connected: its monitor must be listening before it is."""
    socket = _socket(context, zmq.DEALER, address, queue_messages)
    socket.set(zmq.ROUTING_ID, hello)
    return socket


def publishing_socket(context: SocketContext, address: str, queue_messages: int) -> Socket:
    """Raises zmq.ZMQError when the address is taken."""
    return _bound(_socket(context, zmq.PUB, address, queue_messages), address)


def subscribing_socket(context: SocketContext, address: str, queue_messages: int) -> Socket:
    socket = _socket(context, zmq.SUB, address, queue_messages)
    socket.connect(address)
    return socket


def _socket(context: SocketContext, kind: int, address: str, queue_messages: int) -> Socket:
    socket = context.socket(kind)
    socket.set(zmq.LINGER, LINGER_MS)
    socket.set(zmq.SNDHWM, queue_messages)
    socket.set(zmq.RCVHWM, queue_messages)
    socket.set(zmq.RECONNECT_IVL, RECONNECT_MS)
    socket.set(zmq.RECONNECT_IVL_MAX, LONGEST_RECONNECT_MS)
    if address.startswith("tcp://"):
        # A host that lost power or network sends no goodbye.
        socket.set(zmq.TCP_KEEPALIVE, 1)
        socket.set(zmq.HEARTBEAT_IVL, HEARTBEAT_INTERVAL_MS)
        socket.set(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        socket.set(zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT_MS)
    return socket


def _bound(socket: Socket, address: str) -> Socket:
    try:
        socket.bind(address)
    except zmq.ZMQError:
        socket.close(linger=0)
        raise
    return socket


# Parts at least this long are handed over by reference; below it a copy is cheaper.
COPY_BELOW_BYTES = 65_536
# Messages taken from one socket before others of the event loop get their turn.
BURST_MESSAGES = 128
# As numbers: ZeroMQ's own are enumerations, which cost more to combine than a part costs to send.
_NOW = int(zmq.NOBLOCK)
_NOW_AND_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
_EVENTS = int(zmq.EVENTS)
_READABLE = int(zmq.POLLIN)
_WATCHED = zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED


def send_now(socket: Socket, parts: Sequence[Frame]) -> bool:
    """False when the socket's queue is full. Other ZeroMQ errors are raised."""
    # Before the first is sent: half a message cannot be taken back.
    copied = [memoryview(part).nbytes < COPY_BELOW_BYTES for part in parts]
    try:
        for part, copy in zip(parts[:-1], copied, strict=False):
            socket.send(part, _NOW_AND_MORE, copy)
        socket.send(parts[-1], _NOW, copied[-1])
    except zmq.Again:
        return False
    return True


def readable(socket: Socket) -> bool:
    """Whether a message has arrived. Asking also rearms the socket's descriptor, which only signals changes."""
    return bool(int(socket.get(_EVENTS)) & _READABLE)


def receive_now(socket: Socket) -> list[Frame] | None:
    """One message, large parts without a copy; None when there is none."""
    # The error for a message that is not there costs more than to ask.
    if not readable(socket):
        return None
    try:
        frame = socket.recv(_NOW, False)
    except zmq.Again:
        return None
    parts = [_content(frame)]
    while frame.more:
        frame = socket.recv(_NOW, False)
        parts.append(_content(frame))
    return parts


def _content(frame: zmq.Frame) -> Frame:
    return frame.bytes if len(frame) < COPY_BELOW_BYTES else frame.buffer


class PeerLink:
    """Sends to a peer and hears its answers; notices when the peer goes and comes back.

    While the peer is away, messages wait in a backlog of ours. When the connection is lost, what the socket still
    held goes with it: nothing that was sent to the peer's past self reaches its next one.
    """

    def __init__(
        self,
        make_socket: Callable[[], Socket],
        address: str,
        queue_messages: int,
        on_answer: Callable[[Sequence[Frame]], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._make_socket = make_socket
        self._address = address
        self._on_answer = on_answer
        self._on_lost = on_lost
        self._backlog = Backlog(queue_messages)
        self._connected = False
        self._open()

    def transmit(self, parts: Parts) -> bool:
        """False when the queue for the peer is full."""
        if not self._connected:
            return self._backlog.add(parts)
        if not send_now(self._socket, parts):
            return False
        self._look_again()
        return True

    def withdraw(self, correlation: bytes) -> None:
        """Take a request back that still waits for the peer to come."""
        if len(self._backlog):
            self._backlog.withdraw(correlation)

    def close(self, linger_ms: int) -> None:
        """What was sent may still leave for ``linger_ms``, also to a peer that is only just coming."""
        if self._socket.closed:
            return
        if linger_ms:
            self._hand_over()
        for socket in (self._monitor, self._socket):
            self._loop.remove_reader(socket.fileno())
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=linger_ms)

    def _open(self) -> None:
        self._socket = self._make_socket()
        self._monitor = self._socket.get_monitor_socket(_WATCHED)
        self._loop.add_reader(self._monitor.fileno(), self._on_monitor)
        self._loop.add_reader(self._socket.fileno(), self._on_readable)
        # Descriptors signal changes only, and the first one only after a look.
        self._on_monitor()
        self._on_readable()
        self._socket.connect(self._address)

    def _look_again(self) -> None:
        # Whatever uses the socket may have consumed the signal.
        if readable(self._socket):
            self._loop.call_soon(self._on_readable)

    def _on_readable(self) -> None:
        for _ in range(BURST_MESSAGES):
            if self._socket.closed:
                return
            parts = receive_now(self._socket)
            if parts is None:
                return
            self._on_answer(parts)
        self._loop.call_soon(self._on_readable)

    def _on_monitor(self) -> None:
        while not self._monitor.closed:
            try:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))["event"]
            except zmq.Again:
                return
            if event == zmq.Event.HANDSHAKE_SUCCEEDED:
                self._came()
            elif self._connected:
                self._went()
                return

    def _came(self) -> None:
        self._connected = True
        self._hand_over()
        self._look_again()

    def _hand_over(self) -> None:
        # The socket's own queue is as long as the backlog and empty.
        for parts in self._backlog.take_all():
            send_now(self._socket, parts)

    def _went(self) -> None:
        # Answers that arrived before the connection was lost still count.
        while (parts := receive_now(self._socket)) is not None:
            self._on_answer(parts)
        self._connected = False
        self.close(linger_ms=0)
        self._open()
        self._on_lost()
