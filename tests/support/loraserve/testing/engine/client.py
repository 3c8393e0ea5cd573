"""Asks engines as router and gateway do together, and sees of them what the monitor tells."""

import asyncio
from collections.abc import Callable
from contextlib import suppress

from loraserve.adapter.pack import Slab
from loraserve.bus.protocol import Bus
from loraserve.errors import LoraServeError
from loraserve.messages import (
    AdapterRef,
    Admit,
    Admitted,
    ClusterLoad,
    ClusterStatistics,
    EngineCounters,
    EngineLoad,
    Failed,
    Ping,
    Pong,
    ReadCounts,
    SamplingParams,
    TokenBatch,
)
from loraserve.service import ServiceState

POLL_S = 0.005
ANSWER_S = 30.0


class EngineClient:
    """``bus`` is a gateway's. ``listen`` runs beside whatever else is done with it."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._asked = 0
        self._tokens: dict[str, list[int]] = {}
        self._over: dict[str, str] = {}
        self.loads: dict[str, EngineLoad] = {}
        """Of engines that live, as they last reported."""
        self.counters: dict[str, EngineCounters] = {}

    async def listen(self) -> None:
        self._bus.subscribe("monitor", "load")
        self._bus.subscribe("monitor", "statistics")
        while True:
            match (await self._bus.receive()).message:
                case TokenBatch(deltas=deltas):
                    # Some may be of requests of another who had this name before.
                    for delta in (each for each in deltas if each.request_id in self._tokens):
                        self._tokens[delta.request_id].extend(delta.tokens)
                        if delta.finish is not None:
                            self._over[delta.request_id] = delta.finish
                case Failed(request_id=request_id, code=code, message=message):
                    self._over[request_id] = f"{code}: {message}"
                case ClusterLoad(engines=engines):
                    self.loads = {seen.load.engine: seen.load for seen in engines if seen.alive}
                case ClusterStatistics(engines=counters):
                    self.counters = counters

    async def serving(self, name: str) -> Pong:
        """Any process, once it does."""
        while True:
            pong = await self._pong(name)
            if pong is not None and pong.state == ServiceState.READY:
                return pong
            await asyncio.sleep(POLL_S)

    async def ready(self, engine: str) -> None:
        """It serves, and the monitor has heard of this very one."""
        pong = await self.serving(engine)
        await until(lambda: engine in self.loads and self.loads[engine].incarnation == pong.incarnation)
        await until(lambda: engine in self.counters)

    async def admit(self, engine: str, adapter: AdapterRef, prompt: tuple[int, ...], tokens: int) -> str:
        """The request's id; it runs."""
        self._asked += 1
        request_id = f"{self._bus.incarnation}.{self._asked}"
        self._tokens[request_id] = []
        admit = Admit(
            request_id=request_id,
            gateway=self._bus.name,
            prompt_tokens=prompt,
            sampling=SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True),
            adapter=adapter,
        )
        admitted = await self._bus.request(engine, admit, Admitted, ANSWER_S)
        assert admitted.ok, admitted
        return request_id

    def over(self, request_id: str) -> bool:
        """It has finished, or failed."""
        return request_id in self._over

    async def tokens(self, request_id: str) -> list[int]:
        """All of them, once it has finished."""
        await until(lambda: self.over(request_id))
        assert self._over[request_id] == "length", self._over[request_id]
        return self._tokens[request_id]

    async def known(self, engine: str, slab: Slab) -> None:
        """The monitor has heard that the engine has it."""
        await until(lambda: any(each.version == slab.version for each in self.loads[engine].adapters.resident))

    def reads(self, engine: str, source: str) -> ReadCounts:
        """Of the engine's last report; it has one transport."""
        found = [each for each in self.counters[engine].reads if each.source == source]
        assert len(found) <= 1, found
        return found[0] if found else ReadCounts(source=source, transport="")

    async def _pong(self, name: str) -> Pong | None:
        try:
            return await self._bus.request(name, Ping(), Pong, ANSWER_S)
        except LoraServeError:
            # Its last life died of it, perhaps.
            return None


def reference(slab: Slab) -> AdapterRef:
    """As its registration gives it, but for the name."""
    return AdapterRef(
        name=f"adapter-{slab.version[:8]}",
        version=slab.version,
        rank=slab.header.rank,
        slab_bytes=slab.header.slab_bytes,
    )


async def within(seconds: float, condition: Callable[[], bool]) -> bool:
    """Whether it came to that in time."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await until(condition)
    return condition()


async def until(condition: Callable[[], bool]) -> None:
    """Whoever waits sets the limit."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(POLL_S)
