"""A real loader among scripted peers, a monitor that names them and a store, over real tcp transfers."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import Any

from loraserve.adapter.pack import Slab
from loraserve.clock import SystemClock
from loraserve.config import Config, EngineConfig
from loraserve.engine.adapters.pool import AdapterPool
from loraserve.engine.loading.arrival import ReadAnnouncer
from loraserve.engine.loading.loader import AdapterLoader
from loraserve.engine.loading.memory import HostPool, PoolMemory
from loraserve.engine.loading.sources import PeerTransports, SourceFinder
from loraserve.engine.loading.speeds import LinkSpeeds
from loraserve.engine.schedule.report import SpeedMeter
from loraserve.messages import Copies, FindCopies, ToEngine, ToMonitor, ToStore
from loraserve.testing.engine.offline import adapter_reference
from loraserve.testing.memory_bus import MemoryNetwork
from loraserve.testing.scripted_owner import ABLE, ScriptedOwner

OFFSET, GUARD = 4096, b"\x55"
TIMEOUT_S = 20.0


def make_loader(memory: PoolMemory, sources: SourceFinder, engine: EngineConfig) -> AdapterLoader:
    """Return a loader that reads into ``memory``. It is only good for `AdapterLoader.read_slab`."""
    runner: Any = SimpleNamespace(pool=memory, steps_ahead=0)
    announcer = ReadAnnouncer(runner, SpeedMeter(), sources.speeds, lambda event: None)
    cache: Any = None
    return AdapterLoader(runner, AdapterPool(1 << 20, 1), cache, sources, announcer, engine)


class LoadScene:
    """The loader and its surroundings. The bytes around the target extent must not change."""

    def __init__(self, slab: Slab, store: Any, peers: int) -> None:
        self.network = MemoryNetwork()
        self.slab = slab
        self.ref = adapter_reference("one", self.slab)
        self.store = store
        self.owners = [ScriptedOwner(self.network.bus(f"engine-{n}", ToEngine), self.slab) for n in range(1, peers + 1)]
        self.monitor = self.network.bus("monitor", ToMonitor)
        self.memory = bytearray(GUARD * (OFFSET + len(self.slab.data) + OFFSET))
        pool = HostPool(memoryview(self.memory))
        bus, clock = self.network.bus("engine-0", ToEngine), SystemClock()
        engine = EngineConfig(load_chunk_bytes=8192, load_timeout_s=TIMEOUT_S, digest_threads=1)
        config = Config(engine=engine)
        self.sources = SourceFinder(bus, config, clock, LinkSpeeds(), PeerTransports(bus, pool, None, ABLE))
        self.loader = make_loader(pool, self.sources, engine)

    async def start(self, stack: AsyncExitStack) -> None:
        serving = [owner.serve() for owner in self.owners]
        serving += [self.store.serve(self.network.bus("store", ToStore)), self._name_holders()]
        for work in serving:
            stack.callback(asyncio.create_task(work).cancel)
        stack.callback(self.loader.close)

    async def load(self) -> str:
        """Load the slab, check the memory, and return the source that it came from."""
        loaded = await self.loader.read_slab(self.ref, OFFSET)
        assert bytes(self.memory[OFFSET : OFFSET + len(self.slab.data)]) == bytes(self.slab.data)
        self.check_around()
        return loaded.source.name

    def check_around(self) -> None:
        assert self.memory[:OFFSET] == GUARD * OFFSET
        assert self.memory[-OFFSET:] == GUARD * OFFSET

    def failed(self, source: str) -> tuple[int, int]:
        """Return the failed reads from a source, and the mismatches among them."""
        counts = [each for each in self.loader.counts() if each.source == source]
        return sum(each.failed for each in counts), sum(each.mismatched for each in counts)

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    async def _name_holders(self) -> None:
        while True:
            envelope = await self.monitor.receive()
            assert isinstance(envelope.message, FindCopies)
            holders = tuple(owner.holder() for owner in self.owners)
            self.monitor.respond(envelope, Copies(version=envelope.message.version, holders=holders))


Scenario = Callable[[LoadScene], Awaitable[None]]


def play(scenario: Scenario, slab: Slab, store: Any, peers: int) -> None:
    """Run a scenario in a scene of its own."""

    async def main() -> None:
        async with AsyncExitStack() as stack:
            made = LoadScene(slab, store, peers)
            await made.start(stack)
            await scenario(made)

    asyncio.run(main())
