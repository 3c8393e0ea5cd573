"""The bus interface of a process, independent of the transport, and the counters of its messages and errors.

A process has one name (``router``, ``engine-0``, ...) and one inbox. ``send`` and ``publish`` never wait. The bus
delivers messages at most once. Messages from one process to another arrive in order, except that publications and
answers may arrive earlier or later. A sender that must know whether a message arrived uses ``request``.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from types import UnionType
from typing import Any, Protocol, TypeVar

import msgspec
import structlog

_log = structlog.get_logger("loraserve.bus")

LOGGED_FIRST = 3
LOGGED_EVERY = 1000
MAX_COUNTED_PEERS = 1000

Frame = bytes | bytearray | memoryview
T = TypeVar("T")


class BusCounters:
    """The counters of one process's bus. The metrics registry reads them.

    Once ``bad`` has MAX_COUNTED_PEERS entries, it counts all further messages under the sender "?". Therefore invented
    sender names cannot exhaust the memory.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self.sent = 0
        self.received = 0
        self.late_replies = 0
        self.bad: Counter[tuple[str, str]] = Counter()
        self.dropped: Counter[str] = Counter()

    def count_bad(self, sender: str, reason: str, detail: str) -> None:
        """Count and log a received message that was refused or dropped because of its content."""
        sender = sender if len(self.bad) < MAX_COUNTED_PEERS else "?"
        self.bad[sender, reason] += 1
        count = self.bad[sender, reason]
        if count <= LOGGED_FIRST or count % LOGGED_EVERY == 0:
            _log.warning("bad_message", bus=self._owner, sender=sender, reason=reason, detail=detail, count=count)

    def count_dropped(self, peer: str, why: str) -> None:
        """Count and log a message that was not sent to its peer."""
        self.dropped[peer] += 1
        count = self.dropped[peer]
        if count <= LOGGED_FIRST or count % LOGGED_EVERY == 0:
            _log.warning("message_dropped", bus=self._owner, peer=peer, why=why, count=count)


class Envelope(msgspec.Struct, frozen=True):
    """A received message. ``reply_to`` is the opaque return address of a request, or empty for other messages."""

    sender: str
    message: Any
    frames: tuple[bytes | memoryview, ...] = ()
    reply_to: tuple[bytes, ...] = ()
    topic: str = ""


class Bus(Protocol):
    """The connection of one process to the bus. Do not change raw frames after sending: large ones are not copied."""

    @property
    def name(self) -> str: ...

    @property
    def incarnation(self) -> str: ...

    @property
    def counters(self) -> BusCounters: ...

    def send(self, peer: str, message: Any, frames: Sequence[Frame] = ()) -> bool:
        """Send a one-way message. If the peer's queue is full, count and drop the message and return False.

        The queue keeps up to ``bus.queue_messages`` messages for a peer that is not running yet or is restarting.
        """

    async def request(
        self, peer: str, message: Any, reply: type[T] | UnionType, timeout_s: float, frames: Sequence[Frame] = ()
    ) -> T:
        """Send a request and return the answer, decoded strictly as ``reply`` (a message type or a union of types).

        Raises PeerError if the peer refuses the request or its answer does not decode. Raises RequestTimeoutError
        after ``timeout_s``, or at once if the connection is lost; the peer may then have acted on the request. A
        request that times out before its peer connects is never delivered. If this process was paused when the time
        ran out, the answer may wait in its socket, so the request waits a little longer.
        """

    async def request_frames(
        self, peer: str, message: Any, reply: type[T] | UnionType, timeout_s: float, frames: Sequence[Frame] = ()
    ) -> tuple[T, tuple[bytes | memoryview, ...]]:
        """Like ``request``, but also return the raw frames of the answer."""

    def respond(self, envelope: Envelope, message: Any, frames: Sequence[Frame] = ()) -> None:
        """Answer a request. Has no effect for one-way messages."""

    def refuse(self, envelope: Envelope, code: str, message: str) -> None:
        """Answer a request with an error. The requester raises PeerError(code, message)."""

    def publish(self, topic: str, message: Any) -> None:
        """Send a message to the current subscribers of a topic of this process. Later subscribers do not receive it."""

    def subscribe(self, peer: str, topic: str) -> None:
        """Receive the peer's publications on a topic in the inbox, even after the peer restarts. Idempotent."""

    async def receive(self) -> Envelope:
        """Return the next valid message from the inbox. The bus counts, logs and refuses invalid messages."""

    def watch_connection(self, peer: str, on_lost: Callable[[], None]) -> None:
        """Connect to the peer's inbox and call ``on_lost`` whenever this connection is lost. Replaces earlier calls.

        The kernel closes the connections of a process that dies, so ``on_lost`` is called within milliseconds. It is
        also called if only the network fails. A stopped process keeps its connections.
        """

    async def refuses_connections(self, peer: str, timeout_s: float) -> bool:
        """Return whether the peer's machine refuses connections to its inbox, which proves that the process ended.

        Returns False if the peer listens, or if nothing answers within ``timeout_s``. A process that is stopped still
        listens. A process that has just started does not listen yet.
        """

    def forget(self, peer: str) -> None:
        """Fail the waiting requests to a peer that will not return. Drop its queue and the subscriptions to it."""

    async def close(self) -> None:
        """Fail waiting requests with RequestTimeoutError and close the sockets."""
