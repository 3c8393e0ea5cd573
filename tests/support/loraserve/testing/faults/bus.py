"""A bus that loses, doubles and reorders the messages of one process, or cuts it off from peers."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from random import Random
from types import UnionType
from typing import Any, TypeVar

from loraserve.bus.protocol import Bus, BusCounters, Envelope, Frame
from loraserve.errors import RequestTimeoutError
from loraserve.testing.faults.shim import Shim

T = TypeVar("T")
OVERTAKEN_S = (0.01, 0.2)
"""A message that is overtaken is held for so long."""


class FaultyBus:
    """Passes everything to another bus, with the faults that ``control`` holds at the moment.

    Faults are drawn once for each message that the process sends, publishes, answers with or receives.
    """

    def __init__(self, bus: Bus, control: Shim, rng: Random) -> None:
        self._bus = bus
        self._control = control
        self._rng = rng
        self._received: deque[Envelope] = deque()
        self._arrived = asyncio.Event()
        self._receiving: asyncio.Task[None] | None = None
        self._ignored: set[asyncio.Task[Any]] = set()

    @property
    def name(self) -> str:
        return self._bus.name

    @property
    def incarnation(self) -> str:
        return self._bus.incarnation

    @property
    def counters(self) -> BusCounters:
        return self._bus.counters

    def send(self, peer: str, message: Any, frames: Sequence[Frame] = ()) -> bool:
        self._carry(lambda: self._bus.send(peer, message, frames))
        return True

    async def request(
        self, peer: str, message: Any, reply: type[T] | UnionType, timeout_s: float, frames: Sequence[Frame] = ()
    ) -> T:
        return (await self.request_frames(peer, message, reply, timeout_s, frames))[0]

    async def request_frames(
        self, peer: str, message: Any, reply: type[T] | UnionType, timeout_s: float, frames: Sequence[Frame] = ()
    ) -> tuple[T, tuple[bytes | memoryview, ...]]:
        copies, delay_s = self._draw()
        if copies == 0:
            await asyncio.sleep(timeout_s)
            raise RequestTimeoutError(f"{peer} did not answer {type(message).__name__} in {timeout_s:g} s")
        if delay_s:
            await asyncio.sleep(delay_s)
        if copies == 2:
            self._ignore(self._bus.request_frames(peer, message, reply, timeout_s, frames))
        return await self._bus.request_frames(peer, message, reply, timeout_s, frames)

    def respond(self, envelope: Envelope, message: Any, frames: Sequence[Frame] = ()) -> None:
        self._carry(lambda: self._bus.respond(envelope, message, frames))

    def refuse(self, envelope: Envelope, code: str, message: str) -> None:
        self._carry(lambda: self._bus.refuse(envelope, code, message))

    def publish(self, topic: str, message: Any) -> None:
        self._carry(lambda: self._bus.publish(topic, message))

    def subscribe(self, peer: str, topic: str) -> None:
        self._bus.subscribe(peer, topic)

    async def receive(self) -> Envelope:
        if self._receiving is None:
            self._receiving = asyncio.create_task(self._receive_all())
        while not self._received:
            if self._receiving.done():
                self._receiving.result()
            self._arrived.clear()
            await self._arrived.wait()
        return self._received.popleft()

    def watch_connection(self, peer: str, on_lost: Callable[[], None]) -> None:
        self._bus.watch_connection(peer, on_lost)

    async def refuses_connections(self, peer: str, timeout_s: float) -> bool:
        return await self._bus.refuses_connections(peer, timeout_s)

    def forget(self, peer: str) -> None:
        self._bus.forget(peer)

    async def close(self) -> None:
        if self._receiving is not None:
            self._receiving.cancel()
        await self._bus.close()

    async def _receive_all(self) -> None:
        try:
            while True:
                envelope = await self._bus.receive()
                if envelope.sender not in self._control.message_faults()[3]:
                    self._carry(lambda envelope=envelope: self._deliver(envelope))  # type: ignore[misc]
        finally:
            self._arrived.set()

    def _deliver(self, envelope: Envelope) -> None:
        self._received.append(envelope)
        self._arrived.set()

    def _draw(self) -> tuple[int, float]:
        """Return how many copies of the next message arrive, and after which delay."""
        lost, doubled, delayed, _ = self._control.message_faults()
        chance = self._rng.random()
        copies = 0 if chance < lost else 2 if chance < lost + doubled else 1
        return copies, self._rng.uniform(*OVERTAKEN_S) if self._rng.random() < delayed else 0.0

    def _carry(self, deliver: Callable[[], Any]) -> None:
        copies, delay_s = self._draw()
        for _ in range(copies):
            if delay_s:
                asyncio.get_running_loop().call_later(delay_s, deliver)
            else:
                deliver()

    def _ignore(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._ignored.add(task)
        task.add_done_callback(self._forget_task)

    def _forget_task(self, task: "asyncio.Task[Any]") -> None:
        self._ignored.discard(task)
        if not task.cancelled():
            task.exception()
