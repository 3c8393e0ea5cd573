"""The bus over ZeroMQ, with ipc sockets on one machine and TCP between machines."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any

import zmq

from loraserve.bus import wire
from loraserve.bus.addresses import IPC, Addresses, NameClaim, resolve_addresses, run_dir
from loraserve.bus.endpoint import Endpoint, new_incarnation
from loraserve.bus.link import (
    BURST_MESSAGES,
    LINGER_MS,
    PeerLink,
    Socket,
    inbox_socket,
    is_readable,
    make_context,
    outbox_socket,
    publishing_socket,
    receive_now,
    send_now,
    subscribing_socket,
)
from loraserve.bus.protocol import Envelope, Frame
from loraserve.config import Config
from loraserve.errors import ConfigError, LoraServeError


class _Source:
    """A socket from which the inbox receives: the process's own socket, or a subscription to a peer."""

    def __init__(self, socket: Socket, accept: Callable[[list[Frame]], Envelope | None]) -> None:
        self.socket = socket
        self.accept = accept
        self.readable = False


class ZmqBus(Endpoint):
    """A Bus over ZeroMQ. Create it in the running event loop. A process with ``inbox`` None receives only answers."""

    def __init__(self, config: Config, name: str, inbox: type[Any] | UnionType | None) -> None:
        super().__init__(name, new_incarnation(), inbox)
        self._config = config
        self._queue_messages = config.bus.queue_messages
        self._loop = asyncio.get_running_loop()
        self._links: dict[str, PeerLink] = {}
        self._subscriptions: dict[str, tuple[_Source, set[str]]] = {}
        self._readable: deque[_Source] = deque()
        self._wake: asyncio.Future[None] | None = None
        self._burst = 0
        self._claim: NameClaim | None = None
        self._inbox_source: _Source | None = None
        self._publisher: Socket | None = None
        self._context = make_context()
        try:
            if inbox is not None:
                self._listen(resolve_addresses(config, name))
        except ConfigError:
            self._abandon()
            raise

    def subscribe(self, peer: str, topic: str) -> None:
        if peer not in self._subscriptions:
            socket = subscribing_socket(
                self._context, resolve_addresses(self._config, peer).publications, self._queue_messages
            )
            topics: set[str] = set()
            source = _Source(socket, partial(self._accept_from_publisher, peer, topics))
            self._subscriptions[peer] = (source, topics)
            self._watch(source)
        source, topics = self._subscriptions[peer]
        if topic not in topics:
            topics.add(topic)
            source.socket.subscribe(wire.topic_frame(topic))
            self._check(source)

    async def receive(self) -> Envelope:
        while not self._closed:
            if self._burst >= BURST_MESSAGES:
                self._burst = 0
                await asyncio.sleep(0)
            elif not self._readable:
                self._burst = 0
                self._wake = self._loop.create_future()
                await self._wake
            elif (envelope := self._next()) is not None:
                return envelope
        raise LoraServeError(f"the bus of {self.name} is closed")

    def forget(self, peer: str) -> None:
        link = self._links.pop(peer, None)
        if link is not None:
            link.close(linger_ms=0)
            self._fail_waiting(peer, "it was given up")
        if peer in self._subscriptions:
            self._unwatch(self._subscriptions.pop(peer)[0])

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._fail_waiting(None, "this bus was closed before it answered")
        for link in self._links.values():
            link.close(LINGER_MS)
        for source, _ in self._subscriptions.values():
            self._unwatch(source)
        if self._inbox_source is not None:
            self._unwatch(self._inbox_source)
        if self._publisher is not None:
            self._publisher.close()
        self._wake_receiver()
        # ``term`` waits until lingering messages are sent.
        await asyncio.to_thread(self._context.term)
        self._release()

    def _listen(self, at: Addresses) -> None:
        if at.on_this_machine:
            # The claim also prevents a starting process from removing the socket file of a live one.
            self._claim = NameClaim(run_dir(self._config), self.name)
        address = at.bind_inbox
        try:
            inbox = inbox_socket(self._context, address, self._queue_messages)
            self._inbox_source = _Source(inbox, lambda parts: self._accept(bytes(parts[0]), parts[1:]))
            self._watch(self._inbox_source)
            address = at.bind_publications
            self._publisher = publishing_socket(self._context, address, self._queue_messages)
        except zmq.ZMQError as error:
            raise ConfigError(
                f"{self.name} cannot listen at {address}: {error.strerror}; is another process listening there? "
                "Set bus.bind and bus.bind_pub, or stop it"
            ) from error

    def _abandon(self) -> None:
        self._closed = True
        if self._inbox_source is not None:
            self._unwatch(self._inbox_source)
        self._context.destroy(linger=0)
        self._release()

    def _release(self) -> None:
        if self._claim is not None:
            at = resolve_addresses(self._config, self.name)
            for address in (at.bind_inbox, at.bind_publications):
                if address.startswith(IPC):
                    Path(address.removeprefix(IPC)).unlink(missing_ok=True)
            self._claim.release()

    def _transmit(self, peer: str, message: Any, parts: wire.Parts) -> bool:
        if self._closed or not self._link(peer).transmit(parts):
            self.counters.count_dropped(peer, "this bus is closed" if self._closed else "the queue is full")
            return False
        self.counters.sent += 1
        return True

    def _answer(self, reply_to: tuple[bytes, ...], message: Any, parts: wire.Parts) -> None:
        if self._closed or self._inbox_source is None:
            return
        why = "the queue is full"
        try:
            sent = send_now(self._inbox_source.socket, [reply_to[0], *parts])
        except zmq.ZMQError as error:
            sent, why = False, str(error.strerror)
        if sent:
            self.counters.sent += 1
        else:
            self.counters.count_dropped(self._hello_of(reply_to[0]).name, f"answer: {why}")
        self._check(self._inbox_source)

    def _broadcast(self, topic: str, message: Any, parts: wire.Parts) -> None:
        if self._publisher is not None and not self._closed:
            send_now(self._publisher, parts)
            self.counters.sent += 1

    def _withdraw(self, peer: str, correlation: bytes) -> None:
        if peer in self._links:
            self._links[peer].withdraw(correlation)

    def _link(self, peer: str) -> PeerLink:
        link = self._links.get(peer)
        if link is None:
            address = resolve_addresses(self._config, peer).inbox
            link = self._links[peer] = PeerLink(
                partial(outbox_socket, self._context, address, self._queue_messages, self._hello),
                address,
                self._queue_messages,
                partial(self._accept_answer, peer),
                partial(self._fail_waiting, peer, "its connection was lost before it answered"),
            )
        return link

    def _accept_from_publisher(self, peer: str, topics: set[str], parts: list[Frame]) -> Envelope | None:
        if len(parts) != 2:
            self.counters.count_bad(peer, "bad_frames", f"publication of {len(parts)} parts, expected 2")
            return None
        # ZeroMQ matches topics by prefix: a subscription to "load" also receives "loads".
        topic = bytes(parts[0]).decode(errors="replace").partition("/")[2]
        return self._accept_publication(peer, topic, parts[1]) if topic in topics else None

    def _next(self) -> Envelope | None:
        self._burst += 1
        source = self._readable[0]
        parts = receive_now(source.socket)
        if parts is None:
            source.readable = False
            self._readable.popleft()
            return None
        self._readable.rotate(-1)
        return source.accept(parts)

    def _watch(self, source: _Source) -> None:
        self._loop.add_reader(source.socket.fileno(), self._check, source)
        self._check(source)

    def _unwatch(self, source: _Source) -> None:
        self._loop.remove_reader(source.socket.fileno())
        with contextlib.suppress(ValueError):
            self._readable.remove(source)
        source.socket.close()

    def _check(self, source: _Source) -> None:
        if is_readable(source.socket) and not source.readable:
            source.readable = True
            self._readable.append(source)
            self._wake_receiver()

    def _wake_receiver(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)


def open_bus(config: Config, name: str, inbox: type[Any] | UnionType | None) -> ZmqBus:
    """Open the bus of the process ``name``. Raises ConfigError if the name or its address is in use or invalid."""
    return ZmqBus(config, name, inbox)
