"""An in-process bus. It has the wire format and the rules of the ZeroMQ bus, and it can inject faults."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from types import UnionType
from typing import Any

import msgspec

from loraserve.bus import wire
from loraserve.bus.endpoint import Backlog, Endpoint, new_incarnation
from loraserve.bus.protocol import Envelope, Frame
from loraserve.errors import ConfigError, LoraServeError


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """A fault of one message. ``copies`` 0 loses it and 2 duplicates it. A delay also delays the messages after it."""

    delay_s: float = 0.0
    copies: int = 1


FaultRule = Callable[[str, str, Any], Fault | None]
"""Maps (sender, receiver, message) to a fault or None. The network also calls it for answers and publications."""


class MemoryNetwork:
    """Connects MemoryBus instances by name. Delays use the event loop's clock."""

    def __init__(self, faults: FaultRule | None = None, queue_messages: int = 20_000) -> None:
        self.faults = faults
        self.queue_messages = queue_messages
        self._buses: dict[str, MemoryBus] = {}
        self._backlogs: dict[tuple[str, str], Backlog] = {}
        self._subscribers: dict[tuple[str, str], list[MemoryBus]] = {}
        self._last_due_s: dict[tuple[str, str], float] = {}

    def bus(self, name: str, inbox: type[Any] | UnionType | None, incarnation: str = "") -> "MemoryBus":
        """Add a process to the network and return its bus. The name may be that of a killed or closed process."""
        if name in self._buses:
            raise ConfigError(f"a process named {name} already runs on this network; kill or close it first")
        bus = self._buses[name] = MemoryBus(self, name, incarnation or new_incarnation(), inbox)
        for (sender, peer), backlog in self._backlogs.items():
            if peer == name:
                for parts in backlog.take_all():
                    bus.arrive(self._buses[sender].hello, parts)
        return bus

    def kill(self, name: str) -> None:
        """Stop a process like kill -9: it no longer sends or receives, and requests to it fail."""
        self._buses.pop(name).die()
        for bus in list(self._buses.values()):
            bus.lost(name)
        for subscribers in self._subscribers.values():
            subscribers[:] = [bus for bus in subscribers if bus.name != name]
        self._backlogs = {pair: backlog for pair, backlog in self._backlogs.items() if pair[0] != name}

    def find(self, name: str) -> "MemoryBus | None":
        return self._buses.get(name)

    def backlog(self, sender: str, peer: str) -> Backlog:
        return self._backlogs.setdefault((sender, peer), Backlog(self.queue_messages))

    def subscribe(self, bus: "MemoryBus", peer: str, topic: str) -> None:
        subscribers = self._subscribers.setdefault((peer, topic), [])
        if bus not in subscribers:
            subscribers.append(bus)

    def unsubscribe(self, bus: "MemoryBus", peer: str) -> None:
        for (publisher, _), subscribers in self._subscribers.items():
            if publisher == peer and bus in subscribers:
                subscribers.remove(bus)

    def subscribers(self, publisher: str, topic: str) -> "list[MemoryBus]":
        return list(self._subscribers.get((publisher, topic), ()))

    def carry(self, sender: str, receiver: str, message: Any, deliver: Callable[[], None]) -> None:
        """Deliver a message with its fault, if any. Messages keep their order for each pair of processes."""
        fault = self.faults(sender, receiver, message) if self.faults is not None else None
        fault = fault or Fault()
        for _ in range(fault.copies):
            self._at(sender, receiver, fault.delay_s, deliver)

    def _at(self, sender: str, receiver: str, delay_s: float, deliver: Callable[[], None]) -> None:
        last_s = self._last_due_s.get((sender, receiver), 0.0)
        if delay_s <= 0 and not last_s:
            deliver()
            return
        loop = asyncio.get_running_loop()
        # The event loop does not preserve the order of calls that are due at the same time.
        due_s = max(loop.time() + delay_s, last_s + 1e-6)
        self._last_due_s[sender, receiver] = due_s
        loop.call_at(due_s, deliver)


class MemoryBus(Endpoint):
    """A Bus on a MemoryNetwork."""

    def __init__(
        self, network: MemoryNetwork, name: str, incarnation: str, inbox: type[Any] | UnionType | None
    ) -> None:
        super().__init__(name, incarnation, inbox)
        self._network = network
        self._arrived: deque[Envelope] = deque()
        self._wake: asyncio.Future[None] | None = None

    @property
    def hello(self) -> bytes:
        return self._hello

    def subscribe(self, peer: str, topic: str) -> None:
        self._network.subscribe(self, peer, topic)

    async def receive(self) -> Envelope:
        # Let other tasks run, as a receive from a socket does.
        await asyncio.sleep(0)
        while not self._arrived:
            if self._closed:
                raise LoraServeError(f"the bus of {self.name} is closed")
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        return self._arrived.popleft()

    def watch_connection(self, peer: str, on_lost: Callable[[], None]) -> None:
        self._on_lost[peer] = on_lost

    async def refuses_connections(self, peer: str, timeout_s: float) -> bool:
        return self._network.find(peer) is None

    def forget(self, peer: str) -> None:
        self._on_lost.pop(peer, None)
        self._network.backlog(self.name, peer).take_all()
        self._network.unsubscribe(self, peer)
        self._fail_waiting(peer, "it was given up")

    async def close(self) -> None:
        if not self._closed:
            self._network.kill(self.name)

    def die(self) -> None:
        self._closed = True
        self._fail_waiting(None, "this bus was closed before it answered")
        self._wake_receiver()

    def lost(self, peer: str) -> None:
        self._peer_lost(peer)

    def arrive(self, hello: bytes, parts: Sequence[Frame]) -> None:
        """Receive a message on the connection that ``hello`` identifies."""
        if not self._closed:
            self._put(self._accept(hello, _copied(parts)))

    def arrive_answer(self, peer: str, parts: Sequence[Frame]) -> None:
        if not self._closed:
            self._accept_answer(peer, _copied(parts))

    def arrive_publication(self, publisher: str, topic: str, payload: Frame) -> None:
        if not self._closed:
            self._put(self._accept_publication(publisher, topic, bytes(payload)))

    @property
    def arrived_messages(self) -> int:
        return len(self._arrived)

    def _transmit(self, peer: str, message: Any, parts: wire.Parts) -> bool:
        if self._closed:
            self.counters.count_dropped(peer, "this bus is closed")
            return False
        other = self._network.find(peer)
        if other is not None:
            taken = other.arrived_messages < self._network.queue_messages
            if taken:
                self._network.carry(self.name, peer, message, partial(other.arrive, self._hello, parts))
        else:
            taken = self._network.backlog(self.name, peer).add(parts)
        if taken:
            self.counters.sent += 1
        else:
            self.counters.count_dropped(peer, "the queue is full")
        return taken

    def _answer(self, reply_to: tuple[bytes, ...], message: Any, parts: wire.Parts) -> None:
        if self._closed:
            return
        requester = self._hello_of(reply_to[0])
        other = self._network.find(requester.name)
        if other is None or other.hello != reply_to[0]:
            self.counters.count_dropped(requester.name, "answer: the requester is gone")
            return
        self.counters.sent += 1
        self._network.carry(self.name, other.name, message, partial(other.arrive_answer, self.name, parts))

    def _broadcast(self, topic: str, message: Any, parts: wire.Parts) -> None:
        if self._closed:
            return
        self.counters.sent += 1
        for other in self._network.subscribers(self.name, topic):
            deliver = partial(other.arrive_publication, self.name, topic, parts[1])
            self._network.carry(self.name, other.name, message, deliver)

    def _withdraw(self, peer: str, correlation: bytes) -> None:
        self._network.backlog(self.name, peer).withdraw(correlation)

    def _put(self, envelope: Envelope | None) -> None:
        if envelope is not None:
            self._arrived.append(envelope)
            self._wake_receiver()

    def _wake_receiver(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)


def _copied(parts: Sequence[Frame]) -> list[Frame]:
    # The sender may change its buffers later.
    return [bytes(part) for part in parts]
