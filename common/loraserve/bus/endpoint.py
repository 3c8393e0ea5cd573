"""The code shared by all bus transports: requests and answers, strict decoding, counters, and backlogs."""

import asyncio
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from types import UnionType
from typing import Any, TypeVar

import msgspec

from loraserve.bus import wire
from loraserve.bus.protocol import BusCounters, Envelope, Frame
from loraserve.bus.wire import Parts
from loraserve.errors import ConfigError, PeerError, RequestTimeoutError

T = TypeVar("T")
Answer = tuple[bytes, Frame, tuple[Frame, ...]]
"""The kind, payload and raw frames of an answer."""
MAX_HELLOS = 10_000
LATE_TIMER_S = 0.25
"""A timer that runs this late shows that the process was stopped or its event loop was blocked."""
AFTER_PAUSE_S = 0.5
"""Time to read the answers that arrived during a pause, before requests time out."""


class Backlog:
    """Bounded queue of messages for a peer that is not connected.

    Unlike the queue of a ZeroMQ socket, it supports the removal of requests that timed out.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._parts: deque[Parts] = deque()

    def __len__(self) -> int:
        return len(self._parts)

    def add(self, parts: Parts) -> bool:
        """Append a message. Return False if the queue is full."""
        if len(self._parts) >= self._limit:
            return False
        self._parts.append(parts)
        return True

    def withdraw(self, correlation: bytes) -> None:
        self._parts = deque(parts for parts in self._parts if parts[1] != correlation)

    def take_all(self) -> list[Parts]:
        taken = list(self._parts)
        self._parts.clear()
        return taken


class Waiting(msgspec.Struct):
    """A request that has no answer yet. ``timer`` fails it when its time runs out."""

    peer: str
    answer: "asyncio.Future[Answer]"
    timer: asyncio.TimerHandle | None = None


class Endpoint(ABC):
    """The transport-independent part of a Bus. Use it only from the event loop's thread."""

    def __init__(self, name: str, incarnation: str, inbox: type[Any] | UnionType | None) -> None:
        if not wire.NAME_PATTERN.fullmatch(name):
            raise ConfigError(f"process name {name!r}: use at most 64 of a-z, 0-9, '.', '_', '-', such as engine-0")
        self._name = name
        self._incarnation = incarnation
        self._hello = wire.encode_hello(name, incarnation)
        self._inbox: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(inbox if inbox is not None else None)
        self._decoders: dict[Any, msgspec.msgpack.Decoder[Any]] = {}
        self._hellos: dict[bytes, wire.Hello] = {}
        self._waiting: dict[bytes, Waiting] = {}
        self._on_lost: dict[str, Callable[[], None]] = {}
        self._last_correlation = int.from_bytes(os.urandom(7), "big")
        self._closed = False
        self.counters = BusCounters(name)

    @property
    def name(self) -> str:
        return self._name

    @property
    def incarnation(self) -> str:
        return self._incarnation

    def send(self, peer: str, message: Any, frames: Sequence[Frame] = ()) -> bool:
        return self._transmit(peer, message, wire.pack_message(wire.SEND, wire.NO_CORRELATION, message, frames))

    async def request(
        self, peer: str, message: Any, reply: type[T] | UnionType, timeout_s: float, frames: Sequence[Frame] = ()
    ) -> T:
        answer: T = (await self.request_frames(peer, message, reply, timeout_s, frames))[0]
        return answer

    async def request_frames(
        self, peer: str, message: Any, reply: type[T] | UnionType, timeout_s: float, frames: Sequence[Frame] = ()
    ) -> tuple[T, tuple[bytes | memoryview, ...]]:
        kind, payload, answer_frames = await self._ask(peer, message, timeout_s, frames)
        try:
            if kind == wire.ERROR:
                refusal = wire.decode_payload(self._decoder(wire.Refusal), payload)
                raise PeerError(refusal.code, refusal.message)
            return wire.decode_payload(self._decoder(reply), payload), answer_frames  # type: ignore[return-value]
        except msgspec.DecodeError as error:
            self.counters.count_bad(peer, "bad_reply", str(error))
            raise PeerError("bad_reply", f"{peer} answered {type(message).__name__} with: {error}") from error

    def respond(self, envelope: Envelope, message: Any, frames: Sequence[Frame] = ()) -> None:
        if envelope.reply_to:
            self._answer(
                envelope.reply_to, message, wire.pack_message(wire.REPLY, envelope.reply_to[1], message, frames)
            )

    def refuse(self, envelope: Envelope, code: str, message: str) -> None:
        if envelope.reply_to:
            self._refuse(envelope.reply_to, code, message)

    def publish(self, topic: str, message: Any) -> None:
        self._broadcast(topic, message, wire.pack_publication(topic, message))

    @abstractmethod
    def _transmit(self, peer: str, message: Any, parts: wire.Parts) -> bool:
        """Give a message to the transport. If the transport cannot accept it, count it as dropped and return False."""

    @abstractmethod
    def _answer(self, reply_to: tuple[bytes, ...], message: Any, parts: wire.Parts) -> None:
        """Give an answer to the transport. If it cannot be delivered, count it as dropped."""

    @abstractmethod
    def _broadcast(self, topic: str, message: Any, parts: wire.Parts) -> None:
        """Give a publication to the transport."""

    @abstractmethod
    def _withdraw(self, peer: str, correlation: bytes) -> None:
        """Remove an unanswered request from the peer's queue, so that it is not delivered later."""

    async def _ask(self, peer: str, message: Any, timeout_s: float, frames: Sequence[Frame]) -> Answer:
        if self._closed:
            raise RequestTimeoutError(f"{type(message).__name__} to {peer}: this bus is closed")
        self._last_correlation += 1
        correlation = self._last_correlation.to_bytes(8, "big")
        loop = asyncio.get_running_loop()
        waiting = Waiting(peer, loop.create_future())
        self._waiting[correlation] = waiting
        # ``call_later`` takes a fifth of the time of asyncio.timeout.
        waiting.timer = loop.call_later(timeout_s, _expire_unless_paused, waiting, loop.time() + timeout_s)
        try:
            if not self._transmit(peer, message, wire.pack_message(wire.REQUEST, correlation, message, frames)):
                raise RequestTimeoutError(f"{type(message).__name__} to {peer}: the queue for it is full")
            return await waiting.answer
        except TimeoutError:
            self._withdraw(peer, correlation)
            raise RequestTimeoutError(f"{peer} did not answer {type(message).__name__} in {timeout_s:g} s") from None
        finally:
            waiting.timer.cancel()
            del self._waiting[correlation]
            if not waiting.answer.done() or waiting.answer.cancelled():
                self._withdraw(peer, correlation)

    def _accept(self, hello: bytes, parts: Sequence[Frame]) -> Envelope | None:
        """Decode a message that the inbox received. If it is invalid, count and refuse it and return None."""
        self.counters.received += 1
        sender = self._hello_of(hello)
        try:
            kind, correlation, payload, frames = wire.split_message(parts)
        except wire.BadPartsError as error:
            self.counters.count_bad(sender.name, "bad_frames", str(error))
            return None
        reply_to = (hello, correlation) if kind == wire.REQUEST else ()
        if sender.refusal:
            self._reject(sender.name, reply_to, "protocol_mismatch", sender.refusal)
            return None
        try:
            message = wire.decode_payload(self._inbox, payload)
        except msgspec.DecodeError as error:
            self._reject(sender.name, reply_to, "bad_message", str(error))
            return None
        return Envelope(sender.name, message, frames, reply_to)  # type: ignore[arg-type]

    def _reject(self, sender: str, reply_to: tuple[bytes, ...], code: str, detail: str) -> None:
        self.counters.count_bad(sender, code, detail)
        if reply_to:
            self._refuse(reply_to, code, detail)

    def _accept_publication(self, publisher: str, topic: str, payload: Frame) -> Envelope | None:
        self.counters.received += 1
        try:
            return Envelope(publisher, wire.decode_payload(self._inbox, payload), topic=topic)
        except msgspec.DecodeError as error:
            self.counters.count_bad(publisher, "bad_message", f"publication {topic}: {error}")
            return None

    def _accept_answer(self, peer: str, parts: Sequence[Frame]) -> None:
        self.counters.received += 1
        try:
            kind, correlation, payload, frames = wire.split_message(parts)
        except wire.BadPartsError as error:
            self.counters.count_bad(peer, "bad_frames", str(error))
            return
        waiting = self._waiting.get(correlation)
        if waiting is None or waiting.peer != peer or waiting.answer.done():
            self.counters.late_replies += 1
        else:
            waiting.answer.set_result((kind, payload, frames))

    def _peer_lost(self, peer: str) -> None:
        self._fail_waiting(peer, "its connection was lost before it answered")
        if peer in self._on_lost:
            self._on_lost[peer]()

    def _fail_waiting(self, peer: str | None, why: str) -> None:
        """Fail the waiting requests to ``peer``, or to all peers if it is None."""
        for waiting in self._waiting.values():
            if peer in (None, waiting.peer) and not waiting.answer.done():
                waiting.answer.set_exception(RequestTimeoutError(f"{waiting.peer}: {why}"))

    def _refuse(self, reply_to: tuple[bytes, ...], code: str, message: str) -> None:
        refusal = wire.Refusal(code, message)
        self._answer(reply_to, refusal, wire.pack_message(wire.ERROR, reply_to[1], refusal))

    def _hello_of(self, hello: bytes) -> wire.Hello:
        known = self._hellos.get(hello)
        if known is None:
            if len(self._hellos) >= MAX_HELLOS:
                self._hellos.clear()
            known = self._hellos[hello] = wire.parse_hello(hello)
        return known

    def _decoder(self, kind: Any) -> "msgspec.msgpack.Decoder[Any]":
        decoder = self._decoders.get(kind)
        if decoder is None:
            decoder = self._decoders[kind] = msgspec.msgpack.Decoder(kind)
        return decoder


def _expire_unless_paused(waiting: Waiting, due_s: float) -> None:
    """Fail the request, after a pause of this process only AFTER_PAUSE_S later.

    It is put off once. In an event loop that is always slow, every timer is late.
    """
    loop = asyncio.get_running_loop()
    if loop.time() - due_s > LATE_TIMER_S:
        waiting.timer = loop.call_later(AFTER_PAUSE_S, _expire, waiting)
    else:
        _expire(waiting)


def _expire(waiting: Waiting) -> None:
    if not waiting.answer.done():
        waiting.answer.set_exception(TimeoutError())


def new_incarnation() -> str:
    """Return 16 random hexadecimal characters that identify one run of a process."""
    return os.urandom(8).hex()
