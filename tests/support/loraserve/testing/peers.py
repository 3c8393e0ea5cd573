"""Scripted peers for tests of one service, on a network in memory."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import UnionType
from typing import Any

from loraserve.errors import LoraServeError, PeerError
from loraserve.service import Service, ServiceState
from loraserve.testing.memory_bus import MemoryNetwork

Script = Callable[[Any], Any]
"""Maps a received message to the answer. A PeerError refuses the request, None leaves it unanswered."""


class Peer:
    """A peer that answers by its script after ``delay_s`` and records what it received."""

    def __init__(self, network: MemoryNetwork, name: str, inbox: type[Any] | UnionType, script: Script) -> None:
        self.bus = network.bus(name, inbox)
        self.script = script
        self.delay_s = 0.0
        self.received: list[Any] = []
        self._serving = asyncio.create_task(self._serve())

    def got(self, kind: type[Any]) -> list[Any]:
        """Return the received messages of one type, in order."""
        return [message for message in self.received if isinstance(message, kind)]

    async def _serve(self) -> None:
        while True:
            try:
                envelope = await self.bus.receive()
            except LoraServeError:
                # The network has killed the peer.
                return
            self.received.append(envelope.message)
            answer = self.script(envelope.message)
            await asyncio.sleep(self.delay_s)
            if isinstance(answer, PeerError):
                self.bus.refuse(envelope, answer.code, answer.message)
            elif answer is not None:
                self.bus.respond(envelope, answer)


@asynccontextmanager
async def serving(service: Service) -> AsyncIterator[None]:
    """Run a service within the block, from READY on. Raises the error that ended the service, if any."""
    running = asyncio.create_task(service.run())
    while service.state is ServiceState.STARTING and not running.done():  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    try:
        yield
    finally:
        service.stop()
        await running
