"""What every process sees of the bus, over any transport, and the counters of what went wrong on it.

A process has one name (``router``, ``engine-0``, ...) and one inbox. ``send`` and ``publish`` never wait. Messages are
delivered at most once, and in order per pair of processes; a sender that must know whether a message arrived uses
``request``.
"""

from collections import Counter
from collections.abc import Sequence
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
    """Counters of one process's bus. The metrics registry reads them.

    Above MAX_COUNTED_PEERS further senders are counted together as "?", so that a flood of invented names cannot grow
    the tables.
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
    """A received message. ``reply_to`` is opaque; it is empty unless the sender waits for an answer."""

    sender: str
    message: Any
    frames: tuple[bytes | memoryview, ...] = ()
    reply_to: tuple[bytes, ...] = ()
    topic: str = ""


class Bus(Protocol):
    """One process's connection to the bus. Raw frames are not copied: do not change their bytes after sending."""

    @property
    def name(self) -> str: ...

    @property
    def incarnation(self) -> str: ...

    @property
    def counters(self) -> BusCounters: ...

    def send(self, peer: str, message: Any, frames: Sequence[Frame] = ()) -> bool:
        """Send a one-way message. Return False, drop the message and count it if the peer's queue is full.

        Up to ``bus.queue_messages`` are kept for a peer that has not started yet or is being restarted.
        """

    async def request(
        self, peer: str, message: Any, reply: type[T] | UnionType, timeout_s: float, frames: Sequence[Frame] = ()
    ) -> T:
        """Send a request and return the answer, decoded strictly as ``reply``: a message type or a union of them.

        Raises PeerError if the peer refuses or answers something else. Raises RequestTimeoutError after ``timeout_s``,
        or at once if the connection to the peer is lost; whether the peer acted on the request is then unknown. A
        request that times out before its peer has started is not delivered later.
        """

    async def request_frames(
        self, peer: str, message: Any, reply: type[T] | UnionType, timeout_s: float, frames: Sequence[Frame] = ()
    ) -> tuple[T, tuple[bytes | memoryview, ...]]:
        """Like ``request``, but return the answer's raw frames too."""

    def respond(self, envelope: Envelope, message: Any, frames: Sequence[Frame] = ()) -> None:
        """Answer a request. Does nothing for one-way messages."""

    def refuse(self, envelope: Envelope, code: str, message: str) -> None:
        """Answer a request with an error, which the peer raises as PeerError(code, message)."""

    def publish(self, topic: str, message: Any) -> None:
        """Send a message to all current subscribers of this process's topic. Later subscribers do not get it."""

    def subscribe(self, peer: str, topic: str) -> None:
        """Receive the peer's publications in the inbox from now on, also after the peer restarts. May be repeated."""

    async def receive(self) -> Envelope:
        """Return the next valid message from the inbox. Invalid ones are counted, logged and refused."""

    def forget(self, peer: str) -> None:
        """Drop everything that concerns a peer that will not return: its queue, waiting requests and subscriptions."""

    async def close(self) -> None:
        """Fail waiting requests with RequestTimeoutError and close the sockets."""
