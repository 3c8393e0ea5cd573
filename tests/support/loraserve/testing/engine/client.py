"""A client that sends requests to engines as router and gateway do, and follows the monitor's messages."""

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
    """Sends requests and collects their tokens. ``bus`` is a gateway's; run ``listen`` in a task of its own."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._requests = 0
        self._tokens: dict[str, list[int]] = {}
        self._finished: dict[str, str] = {}
        self.loads: dict[str, EngineLoad] = {}
        """The last report of each live engine."""
        self.counters: dict[str, EngineCounters] = {}

    async def listen(self) -> None:
        self._bus.subscribe("monitor", "load")
        self._bus.subscribe("monitor", "statistics")
        while True:
            match (await self._bus.receive()).message:
                case TokenBatch(deltas=deltas):
                    # Some may belong to requests of an earlier process with this name.
                    for delta in (each for each in deltas if each.request_id in self._tokens):
                        self._tokens[delta.request_id].extend(delta.tokens)
                        if delta.finish is not None:
                            self._finished[delta.request_id] = delta.finish
                case Failed(request_id=request_id, code=code, message=message):
                    self._finished[request_id] = f"{code}: {message}"
                case ClusterLoad(engines=engines):
                    self.loads = {seen.load.engine: seen.load for seen in engines if seen.alive}
                case ClusterStatistics(engines=counters):
                    self.counters = counters

    async def serving(self, name: str) -> Pong:
        """Wait until a process is READY and return its answer to a ping."""
        while True:
            pong = await self._pong(name)
            if pong is not None and pong.state == ServiceState.READY:
                return pong
            await asyncio.sleep(POLL_S)

    async def ready(self, engine: str) -> None:
        """Wait until the engine is READY and the monitor has a report of this incarnation."""
        pong = await self.serving(engine)
        await until(lambda: engine in self.loads and self.loads[engine].incarnation == pong.incarnation)
        await until(lambda: engine in self.counters)

    async def admit(self, engine: str, adapter: AdapterRef, prompt: tuple[int, ...], tokens: int) -> str:
        """Send a request to the engine and return its id once it is admitted."""
        self._requests += 1
        request_id = f"{self._bus.incarnation}.{self._requests}"
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

    def is_finished(self, request_id: str) -> bool:
        """Whether the request has finished or failed."""
        return request_id in self._finished

    async def tokens(self, request_id: str) -> list[int]:
        """Wait until the request has finished and return its tokens."""
        await until(lambda: self.is_finished(request_id))
        assert self._finished[request_id] == "length", self._finished[request_id]
        return self._tokens[request_id]

    async def wait_resident(self, engine: str, slab: Slab) -> None:
        """Wait until the monitor knows that the engine holds the slab."""
        await until(lambda: any(each.version == slab.version for each in self.loads[engine].adapters.resident))

    def reads(self, engine: str, source: str) -> ReadCounts:
        """Return the read counts of a source in the engine's last report, which has at most one transport."""
        found = [each for each in self.counters[engine].reads if each.source == source]
        assert len(found) <= 1, found
        return found[0] if found else ReadCounts(source=source, transport="")

    async def _pong(self, name: str) -> Pong | None:
        try:
            return await self._bus.request(name, Ping(), Pong, ANSWER_S)
        except LoraServeError:
            # The process may have died during the request.
            return None


def reference(slab: Slab) -> AdapterRef:
    """Return the reference of a slab as its registration gives it, except for the name."""
    return AdapterRef(
        name=f"adapter-{slab.version[:8]}",
        version=slab.version,
        rank=slab.header.rank,
        slab_bytes=slab.header.slab_bytes,
    )


async def within(seconds: float, condition: Callable[[], bool]) -> bool:
    """Wait for a condition and return whether it held in time."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await until(condition)
    return condition()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition, without a time limit."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(POLL_S)
