"""A service among scripted peers, on a network in memory."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import UnionType
from typing import Any

from loraserve.bus.memory import MemoryNetwork
from loraserve.errors import LoraServeError, PeerError
from loraserve.service import Service, ServiceState

Script = Callable[[Any], Any]
"""A received message -> the answer; a PeerError refuses, None stays silent."""


class Peer:
    """A process that answers from its script, after ``delay_s``, and keeps what it received."""

    def __init__(self, network: MemoryNetwork, name: str, inbox: type[Any] | UnionType, script: Script) -> None:
        self.bus = network.bus(name, inbox)
        self.script = script
        self.delay_s = 0.0
        self.received: list[Any] = []
        self._serving = asyncio.create_task(self._serve())

    def got(self, kind: type[Any]) -> list[Any]:
        """Messages of one kind, in order."""
        return [message for message in self.received if isinstance(message, kind)]

    async def _serve(self) -> None:
        while True:
            try:
                envelope = await self.bus.receive()
            except LoraServeError:
                # It was killed.
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
    """The service runs, from READY on, and is stopped at the end; raises what it died of."""
    running = asyncio.create_task(service.run())
    while service.state is ServiceState.STARTING and not running.done():  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    try:
        yield
    finally:
        service.stop()
        await running
