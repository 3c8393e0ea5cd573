"""Two engines, a monitor and a store: an adapter is read from the peer that holds it, or from the next source."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from loraserve.clock import SystemClock
from loraserve.config import Config, EngineConfig, MonitorConfig, TransferConfig
from loraserve.cost import extent_bytes
from loraserve.engine.service import BuildRunner, EngineService
from loraserve.messages import (
    Admit,
    Admitted,
    ClusterLoad,
    ClusterStatistics,
    EngineCapabilities,
    EngineCounters,
    EngineLoad,
    Failed,
    ReadCounts,
    ToGateway,
    TokenBatch,
    ToMonitor,
    ToStore,
)
from loraserve.monitor.service import MonitorService
from loraserve.testing.memory_bus import MemoryNetwork
from loraserve.testing.peers import serving

TIMEOUT_S = 20.0
TRANSPORTS = [("shm",), ("tcp",)]


class Pair:
    """Engines engine-0 and engine-1 with their monitor and store; a test chooses where requests go."""

    def __init__(
        self, models: Any, store: Any, transports: tuple[str, ...], build: BuildRunner | None = None, **engine: Any
    ) -> None:
        self.models, self.store, self.build = models, store, build
        self.network = MemoryNetwork()
        settings = msgspec.structs.replace(models.config.engine, **engine)
        transfer = msgspec.convert({"transports": transports}, TransferConfig)
        self.config = msgspec.structs.replace(models.config, engine=settings, transfer=transfer)
        self.engines: dict[str, EngineService] = {}
        self.gateway = self.network.bus("gateway-0", ToGateway)
        self.tokens: dict[str, list[int]] = {}
        self.over: dict[str, str] = {}
        self.loads: dict[str, EngineLoad] = {}
        self.capabilities: dict[str, EngineCapabilities] = {}
        self.counters: dict[str, EngineCounters] = {}

    async def start(self, stack: AsyncExitStack) -> None:
        store = asyncio.create_task(self.store.serve(self.network.bus("store", ToStore)))
        stack.callback(store.cancel)
        monitor = MonitorService(
            Config(monitor=MonitorConfig(publish_interval_s=0.02), engine=EngineConfig(statistics_interval_s=0.02)),
            self.network.bus("monitor", ToMonitor),
            SystemClock(),
        )
        await stack.enter_async_context(serving(monitor))
        for name in ("engine-0", "engine-1"):
            bus = self.network.bus(name, EngineService.inbox)
            engine = self.engines[name] = EngineService(self.config, bus, SystemClock(), self.build)
            engine.drain_timeout_s = 0.1
            await stack.enter_async_context(serving(engine))
        self.gateway.subscribe("monitor", "load")
        self.gateway.subscribe("monitor", "statistics")
        listening = asyncio.create_task(self._listen())
        stack.callback(listening.cancel)

    async def run(self, engine: str, request: str, adapter: str, tokens: int = 8) -> list[int]:
        """Return the tokens of a greedy request."""
        self.tokens[request] = []
        sampling = self.models.greedy(tokens)
        reference = self.models.refs[adapter]
        admit = Admit(
            request_id=request,
            gateway="gateway-0",
            prompt_tokens=self.models.prompt,
            sampling=sampling,
            adapter=reference,
        )
        await self.gateway.request(engine, admit, Admitted, TIMEOUT_S)
        await self.until(lambda: request in self.over)
        assert self.over[request] != "failed"
        return self.tokens[request]

    async def known(self, engine: str, adapter: str) -> None:
        """Wait until the monitor knows that the engine holds an adapter."""
        version = self.models.refs[adapter].version
        await self.until(lambda: version in self._residents(engine))

    def _residents(self, engine: str) -> set[str]:
        return {each.version for each in self.loads[engine].adapters.resident} if engine in self.loads else set()

    async def reads(self, engine: str) -> dict[str, ReadCounts]:
        """Return the reported read counts by source and transport."""
        await self.until(lambda: engine in self.counters and any(each.reads for each in self.counters[engine].reads))
        return {f"{each.source} {each.transport}": each for each in self.counters[engine].reads}

    def poison(self, engine: str, adapter: str) -> None:
        """Flip a bit of a resident adapter."""
        service: Any = self.engines[engine]
        entry = service._scheduler.residency.pool.get(self.models.refs[adapter].version)
        view = service._runner.pool.view(entry.offset_bytes, entry.adapter.slab_bytes)
        np.frombuffer(view, np.uint8)[len(view) // 2] ^= 1

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    async def _listen(self) -> None:
        while True:
            match (await self.gateway.receive()).message:
                case TokenBatch(deltas=deltas):
                    for delta in deltas:
                        self.tokens[delta.request_id].extend(delta.tokens)
                        if delta.finish is not None:
                            self.over[delta.request_id] = delta.finish
                case Failed(request_id=request_id):
                    self.over[request_id] = "failed"
                case ClusterLoad(engines=engines):
                    self.loads = {seen.engine: seen.load for seen in engines}
                    self.capabilities = {seen.engine: seen.capabilities for seen in engines}
                case ClusterStatistics(engines=counters):
                    self.counters = counters


@pytest.fixture
def pair(models: Any, scripted_store: Any) -> Iterator[Callable[..., None]]:
    """Run a scenario with two engines that read over these transports."""
    before = torch.get_num_threads()

    def run(scenario: Callable[[Pair], Awaitable[None]], transports: tuple[str, ...], **engine: Any) -> None:
        async def main() -> None:
            async with AsyncExitStack() as stack:
                both = Pair(models, scripted_store(models.slabs), transports, **engine)
                await both.start(stack)
                await scenario(both)

        asyncio.run(main())

    yield run
    torch.set_num_threads(before)


@pytest.mark.parametrize("transports", TRANSPORTS)
def test_an_adapter_is_read_from_the_peer_that_holds_it(
    pair: Callable[..., None], models: Any, transports: tuple[str, ...]
) -> None:
    async def scenario(both: Pair) -> None:
        truth = models.expected("one", 8)
        assert await both.run("engine-0", "first", "one") == truth
        await both.known("engine-0", "one")
        chunks = both.store.chunks_asked
        assert await both.run("engine-1", "second", "one") == truth
        assert both.store.chunks_asked == chunks
        (read,) = (await both.reads("engine-1")).values()
        assert (read.source, read.transport, read.reads) == ("engine-0", *transports, 1)
        assert read.read_bytes == models.refs["one"].slab_bytes
        assert both.capabilities["engine-1"].abilities.transports == transports

    pair(scenario, transports)


def test_a_copy_damaged_at_its_owner_is_read_from_the_next_source(
    pair: Callable[..., None], models: Any, capfd: Any
) -> None:
    async def scenario(both: Pair) -> None:
        await both.run("engine-0", "first", "one")
        await both.known("engine-0", "one")
        both.poison("engine-0", "one")
        assert await both.run("engine-1", "second", "one") == models.expected("one", 8)
        reads = await both.reads("engine-1")
        assert (reads["engine-0 shm"].failed, reads["engine-0 shm"].mismatched) == (1, 1)
        assert reads["store bus"].reads == 1
        # The owner is told, and reloads the adapter before it runs with it again.
        damaged = both.engines["engine-0"]._scheduler.residency.pool
        await both.until(lambda: models.refs["one"].version not in damaged)
        assert await both.run("engine-0", "third", "one") == models.expected("one", 8)

    pair(scenario, ("shm", "tcp"))
    said = capfd.readouterr().out
    assert "source_failed" in said
    assert "slab_damaged" in said
    assert "own_copy_checked" in said


@pytest.mark.parametrize("transports", TRANSPORTS)
def test_an_adapter_evicted_by_the_peer_is_read_from_its_host_cache(
    pair: Callable[..., None], models: Any, transports: tuple[str, ...]
) -> None:
    pool_bytes = extent_bytes(max(ref.slab_bytes for ref in models.refs.values()))

    async def scenario(both: Pair) -> None:
        for adapter in ("one", "two"):
            await both.run("engine-0", adapter, adapter)
        version = models.refs["one"].version
        await both.until(lambda: "engine-0" in both.loads and version in both.loads["engine-0"].adapters.cached)
        chunks = both.store.chunks_asked
        assert await both.run("engine-1", "again", "one") == models.expected("one", 8)
        assert both.store.chunks_asked == chunks
        (read,) = (await both.reads("engine-1")).values()
        assert (read.source, read.transport, read.reads) == ("engine-0", *transports, 1)

    pair(scenario, transports, pool_bytes=pool_bytes, host_cache_bytes=1 << 20)


def test_without_transports_the_store_is_the_only_source(pair: Callable[..., None]) -> None:
    async def scenario(both: Pair) -> None:
        await both.run("engine-0", "first", "one")
        await both.known("engine-0", "one")
        await both.run("engine-1", "second", "one")
        assert list(await both.reads("engine-1")) == ["store bus"]

    pair(scenario, ())


def test_ten_requests_for_one_missing_adapter_cause_one_read(pair: Callable[..., None], models: Any) -> None:
    async def scenario(both: Pair) -> None:
        await both.run("engine-0", "first", "one")
        await both.known("engine-0", "one")
        answers = await asyncio.gather(*(both.run("engine-1", f"r{n}", "one") for n in range(10)))
        assert answers == [models.expected("one", 8)] * 10
        assert [each.reads for each in (await both.reads("engine-1")).values()] == [1]

    pair(scenario, ("shm",))


def test_a_lease_ends_when_the_read_has_ended(pair: Callable[..., None]) -> None:
    async def scenario(both: Pair) -> None:
        await both.run("engine-0", "first", "one")
        await both.known("engine-0", "one")
        await both.run("engine-1", "second", "one")
        assert (await both.reads("engine-1")).keys() == {"engine-0 shm"}
        pool = both.engines["engine-0"]._scheduler.residency.pool
        await both.until(lambda: pool.leases == 0)

    pair(scenario, ("shm",))


def test_a_slab_is_read_over_the_network_between_two_device_pools(pair: Callable[..., None], models: Any) -> None:
    """Both pools belong to CUDA runners, which use Triton's interpreter if there is no GPU."""
    pytest.importorskip("triton", reason="the CUDA runner needs triton")
    from loraserve.engine.cuda.runner import load_cuda_runner

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def build(config: Config, progress: Callable[[str], None]) -> Any:
        return load_cuda_runner(Path(config.model.path), config.engine, device, progress)

    async def scenario(both: Pair) -> None:
        truth = models.expected("one", 2)
        assert await both.run("engine-0", "first", "one", tokens=2) == truth
        await both.known("engine-0", "one")
        assert await both.run("engine-1", "second", "one", tokens=2) == truth
        assert list(await both.reads("engine-1")) == ["engine-0 tcp"]

    pair(
        scenario, ("tcp",), build=build, max_adapters=2, max_rank=8, max_step_tokens=32, max_running=2,
        memory_fraction=0.1,
    )  # fmt: skip
