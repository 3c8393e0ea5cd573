"""The one place where ZeroMQ sockets are made, so that every one of them has the same safeguards."""

import zmq

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
