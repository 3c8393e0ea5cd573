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
REMEMBERED_PEERS = 1000


class BusCounters:
    """Plain counters. Strangers all count as "?", so a flood of made-up names cannot grow the tables."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self.sent = 0
        self.received = 0
        self.late_replies = 0
        self.bad: Counter[tuple[str, str]] = Counter()
        self.dropped: Counter[str] = Counter()

    def count_bad(self, sender: str, reason: str, detail: str) -> None:
        """A message that was refused or dropped because of what it held."""
        sender = sender if len(self.bad) < REMEMBERED_PEERS else "?"
        self.bad[sender, reason] += 1
        count = self.bad[sender, reason]
        if count <= LOGGED_FIRST or count % LOGGED_EVERY == 0:
            _log.warning("bad_message", bus=self._owner, sender=sender, reason=reason, detail=detail, count=count)

    def count_dropped(self, peer: str, why: str) -> None:
        """A message of ours that will not reach its peer."""
        self.dropped[peer] += 1
        count = self.dropped[peer]
        if count <= LOGGED_FIRST or count % LOGGED_EVERY == 0:
            _log.warning("message_dropped", bus=self._owner, peer=peer, why=why, count=count)


Frame = bytes | bytearray | memoryview
T = TypeVar("T")


class Envelope(msgspec.Struct, frozen=True):
    """A received message. ``reply_to`` is opaque and empty unless the sender waits for an answer."""

    sender: str
    message: Any
    frames: tuple[bytes | memoryview, ...] = ()
    reply_to: tuple[bytes, ...] = ()
    topic: str = ""


class Bus(Protocol):
    """One process's place on the bus. Raw frames are not copied: their bytes must not change after they are sent."""

    @property
    def name(self) -> str: ...

    @property
    def incarnation(self) -> str: ...

    @property
    def counters(self) -> BusCounters: ...

    def send(self, peer: str, message: Any, frames: Sequence[Frame] = ()) -> bool:
        """One-way. False when the peer's queue is full: the message is dropped and counted.

        A peer that is not there yet, or is being restarted, gets up to ``bus.queue_messages`` when it comes.
        """

    async def request(
        self, peer: str, message: Any, reply: type[T] | UnionType, timeout_s: float, frames: Sequence[Frame] = ()
    ) -> T:
        """The peer's answer, decoded strictly as ``reply``, a message or a union of messages.

        Raises PeerError when the peer refused or answered something else, and RequestTimeout after ``timeout_s`` or as
        soon as the peer's connection is lost; whether the peer acted on it is then unknown. A request that timed out
        before its peer was there is not delivered any more.
        """

    async def request_frames(
        self, peer: str, message: Any, reply: type[T] | UnionType, timeout_s: float, frames: Sequence[Frame] = ()
    ) -> tuple[T, tuple[bytes | memoryview, ...]]:
        """Like ``request``, with the raw frames beside the answer."""

    def respond(self, envelope: Envelope, message: Any, frames: Sequence[Frame] = ()) -> None:
        """Answer a request; nothing happens for one-way messages."""

    def refuse(self, envelope: Envelope, code: str, message: str) -> None:
        """Answer a request with an error, raised at the peer as PeerError(code, message)."""

    def publish(self, topic: str, message: Any) -> None:
        """To every subscriber of (this process, topic). Late subscribers miss it."""

    def subscribe(self, peer: str, topic: str) -> None:
        """From now on the peer's publications arrive in the inbox, over restarts of the peer too; repeating is fine."""

    async def receive(self) -> Envelope:
        """Next message from the inbox that decoded well; others are counted, logged and refused."""

    def forget(self, peer: str) -> None:
        """Drop a peer that is gone for good: what is queued for it, what waits for it, what it publishes."""

    async def close(self) -> None:
        """Fails waiting requests with RequestTimeout and frees the sockets."""
