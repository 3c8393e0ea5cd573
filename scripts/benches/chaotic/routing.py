"""Takes the router's place, so that the bench chooses the engine of each attempt.

The gateway is real: it migrates the requests of killed engines by asking for another engine, as it asks the router.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

from chaotic.cluster import Victims
from loraserve.bus.protocol import Bus, Envelope
from loraserve.bus.zmq import open_bus
from loraserve.config import Config
from loraserve.errors import PeerError, RequestTimeoutError
from loraserve.messages import Abort, Admit, Admitted, Ping, Pong, Rejected, Route, Routed, ToRouter

NAME = "router"
ADMIT_TIMEOUT_S = 2.0
PAUSE_S = 0.05


class Routing:
    """Admits each request at a random engine that may run it. Requests are recognised by their seeds.

    ``at`` has the (engine, adapter) pairs that each running request was sent to.
    """

    def __init__(self, bus: Bus, victims: Victims, rng: Random) -> None:
        self.migrations = 0
        """Attempts that engines admitted, without the first of each request."""
        self._bus = bus
        self._victims = victims
        self._rng = rng
        self._wanted: dict[int, str] = {}
        self._at: dict[int, set[tuple[str, str]]] = {}
        self._admitted: set[int] = set()
        self._routing: dict[str, asyncio.Task[Routed | Rejected]] = {}

    def expect(self, seed: int, engine: str) -> None:
        """Send the first attempt of the request with this seed to this engine, if it is up."""
        self._wanted[seed] = engine
        self._at[seed] = set()

    def forget(self, seed: int) -> None:
        """Note that the request has ended."""
        self._wanted.pop(seed, None)
        self._at.pop(seed, None)
        self._admitted.discard(seed)

    def may_run(self, place: tuple[str, str]) -> bool:
        """Return whether a request for an adapter may run at an engine."""
        return any(place in places for places in self._at.values())

    async def listen(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            while True:
                envelope = await self._bus.receive()
                match envelope.message:
                    case Route() as route:
                        tasks.create_task(self._answer(envelope, route))
                    case Ping():
                        self._bus.respond(envelope, self._pong())

    async def _answer(self, envelope: Envelope, route: Route) -> None:
        # The gateway may ask again while its question is being answered.
        routing = self._routing.get(route.request_id)
        if routing is None:
            routing = self._routing[route.request_id] = asyncio.create_task(self._route(route))
        try:
            self._bus.respond(envelope, await asyncio.shield(routing))
        finally:
            self._routing.pop(route.request_id, None)

    async def _route(self, route: Route) -> Routed | Rejected:
        seed, adapter = route.sampling.seed, route.adapter.name if route.adapter else ""
        refused: set[str] = set()
        # Ends when the client has its answer or has given up.
        while seed in self._at:
            engines = [name for name in self._victims.askable(adapter) if name not in refused]
            engine = self._wanted.pop(seed, "")
            if engine not in engines:
                if not engines:
                    refused.clear()
                    await asyncio.sleep(PAUSE_S)
                    continue
                better = [name for name in engines if name not in route.avoid]
                engine = self._rng.choice(better or engines)
            self._at[seed].add((engine, adapter))
            incarnation = await self._admit(engine, route)
            if incarnation:
                self.migrations += seed in self._admitted
                self._admitted.add(seed)
                return Routed(request_id=route.request_id, engine=engine, incarnation=incarnation, why="chaos")
            refused.add(engine)
        return Rejected(request_id=route.request_id, code="no_engine", message="nobody waits for this request")

    async def _admit(self, engine: str, route: Route) -> str:
        """Return the incarnation of the engine if it admits the request, else ""."""
        admit = Admit(
            request_id=route.request_id,
            gateway=route.gateway,
            prompt_tokens=route.prompt_tokens,
            sampling=route.sampling,
            adapter=route.adapter,
            generated=route.generated,
        )
        try:
            answer = await self._bus.request(engine, admit, Admitted, ADMIT_TIMEOUT_S)
        except (RequestTimeoutError, PeerError):
            self._bus.send(engine, Abort(request_id=route.request_id))
            return ""
        return answer.incarnation if answer.ok else ""

    def _pong(self) -> Pong:
        return Pong(name=NAME, state="READY", incarnation=self._bus.incarnation, pid=0, protocol=0, detail="")


@asynccontextmanager
async def routing(config: Config, victims: Victims, rng: Random) -> AsyncIterator[Routing]:
    """Answer the gateway's questions within the block."""
    bus = open_bus(config, NAME, ToRouter)
    router = Routing(bus, victims, rng)
    listening = asyncio.create_task(router.listen())
    try:
        yield router
    finally:
        listening.cancel()
        await bus.close()
