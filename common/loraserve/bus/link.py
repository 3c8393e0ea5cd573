"""Creates and configures ZeroMQ sockets, and manages the connection to one peer's inbox."""

import asyncio
from collections.abc import Callable, Sequence

import zmq
from zmq.utils.monitor import parse_monitor_message

from loraserve.bus.endpoint import Backlog
from loraserve.bus.protocol import Frame
from loraserve.bus.wire import Parts

LINGER_MS = 200
DEAD_LINK_S = 6
"""A TCP connection without an answer of the peer's kernel for about this time is closed."""
RECONNECT_MS = 50
LONGEST_RECONNECT_MS = 1_000
CONNECT_TIMEOUT_MS = 1_500
"""The kernel doubles the time between its attempts to connect. Without a limit, a process would find a peer again only
half a minute after a network failure of that length. Connections with a longer round trip are not supported."""
MAX_SOCKETS = 16_384

Socket = zmq.Socket[bytes]
SocketContext = zmq.Context[Socket]


def make_context() -> SocketContext:
    context: SocketContext = zmq.Context()
    context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
    return context


def inbox_socket(context: SocketContext, address: str, queue_messages: int) -> Socket:
    """Return the socket on which a process receives messages. Raises zmq.ZMQError if the address is in use."""
    socket = _socket(context, zmq.ROUTER, address, queue_messages)
    # A peer may reconnect before its old connection is found dead. The new connection then replaces the old one.
    socket.set(zmq.ROUTER_HANDOVER, 1)
    # Answers to a disconnected peer fail and are counted, instead of being dropped silently.
    socket.set(zmq.ROUTER_MANDATORY, 1)
    return _bound(socket, address)


def outbox_socket(context: SocketContext, address: str, queue_messages: int, hello: bytes) -> Socket:
    """Return an unconnected socket for one peer's inbox. The caller opens its monitor, then connects it."""
    socket = _socket(context, zmq.DEALER, address, queue_messages)
    socket.set(zmq.ROUTING_ID, hello)
    return socket


def publishing_socket(context: SocketContext, address: str, queue_messages: int) -> Socket:
    """Return the socket for publications. Raises zmq.ZMQError if the address is in use."""
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
        socket.set(zmq.CONNECT_TIMEOUT, CONNECT_TIMEOUT_MS)
        # The kernel detects hosts that lost power or network and so cannot close their connections. ZeroMQ's own
        # heartbeats would do this too, but libzmq 4.3 may abort when one fails (libzmq issues 3937 and 4767).
        socket.set(zmq.TCP_KEEPALIVE, 1)
        socket.set(zmq.TCP_KEEPALIVE_IDLE, DEAD_LINK_S // 3)
        socket.set(zmq.TCP_KEEPALIVE_INTVL, 1)
        socket.set(zmq.TCP_KEEPALIVE_CNT, DEAD_LINK_S - DEAD_LINK_S // 3)
        socket.set(zmq.TCP_MAXRT, 1000 * DEAD_LINK_S)
    return socket


def _bound(socket: Socket, address: str) -> Socket:
    try:
        socket.bind(address)
    except zmq.ZMQError:
        socket.close(linger=0)
        raise
    return socket


COPY_BELOW_BYTES = 65_536
"""Shorter parts are copied, because a copy is then cheaper than a reference."""
BURST_MESSAGES = 128
"""Most messages received from one socket before other tasks of the event loop run."""
# Plain integers, because combining ZeroMQ enum values takes longer than sending a part.
_NOW = int(zmq.NOBLOCK)
_NOW_AND_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
_EVENTS = int(zmq.EVENTS)
_READABLE = int(zmq.POLLIN)
_WATCHED = zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED


def send_now(socket: Socket, parts: Sequence[Frame]) -> bool:
    """Send a message. Return False if the socket's queue is full. Raises zmq.ZMQError for other errors."""
    # Invalid parts must raise before the first part is sent, because a partial message cannot be withdrawn.
    copied = [memoryview(part).nbytes < COPY_BELOW_BYTES for part in parts]
    try:
        for part, copy in zip(parts[:-1], copied, strict=False):
            socket.send(part, _NOW_AND_MORE, copy)
        socket.send(parts[-1], _NOW, copied[-1])
    except zmq.Again:
        return False
    return True


def is_readable(socket: Socket) -> bool:
    """Return whether a message has arrived. This also rearms the edge-triggered descriptor of the socket."""
    return bool(int(socket.get(_EVENTS)) & _READABLE)


def receive_now(socket: Socket) -> list[Frame] | None:
    """Return one message, or None if none has arrived. Large parts are not copied."""
    # This check is cheaper than the exception that an empty queue raises.
    if not is_readable(socket):
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
    """Sends messages to one peer, receives its answers, and reports a lost connection.

    While the peer is not connected, messages wait in a backlog. A lost connection discards the messages in its socket,
    so a message sent to one incarnation of the peer never reaches the next incarnation.
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
        """Send a message or queue it. Return False if the queue for the peer is full."""
        if not self._connected:
            return self._backlog.add(parts)
        if not send_now(self._socket, parts):
            return False
        self._check_again()
        return True

    def withdraw(self, correlation: bytes) -> None:
        """Remove a request from the backlog."""
        if len(self._backlog):
            self._backlog.withdraw(correlation)

    def close(self, linger_ms: int) -> None:
        """Close the sockets. ZeroMQ tries to send queued messages for up to ``linger_ms``."""
        if self._socket.closed:
            return
        if linger_ms:
            self._send_backlog()
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
        # The descriptors are edge-triggered, so each needs one check before its first event.
        self._on_monitor()
        self._on_readable()
        self._socket.connect(self._address)

    def _check_again(self) -> None:
        # Any operation on the socket may have consumed the event of its descriptor.
        if is_readable(self._socket):
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
                self._connected_again()
            elif self._connected:
                self._disconnected()
                return

    def _connected_again(self) -> None:
        self._connected = True
        self._send_backlog()
        self._check_again()

    def _send_backlog(self) -> None:
        # The socket's queue is empty and has the capacity of the backlog.
        for parts in self._backlog.take_all():
            send_now(self._socket, parts)

    def _disconnected(self) -> None:
        # Deliver answers that arrived before the connection was lost.
        while (parts := receive_now(self._socket)) is not None:
            self._on_answer(parts)
        self._connected = False
        self.close(linger_ms=0)
        self._open()
        self._on_lost()
