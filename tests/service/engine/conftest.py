"""The engine's process on a tiny real model, with a fake store, gateway and monitor that can misbehave."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from loraserve.adapter.format import encode_header
from loraserve.adapter.pack import Slab, pack_peft
from loraserve.bus.protocol import Envelope
from loraserve.config import Config, EngineConfig, ModelConfig, TransferConfig
from loraserve.engine.compute.protocol import DeviceLostError, PendingStep, Runner
from loraserve.engine.schedule.events import StepBatch, StepResult
from loraserve.engine.service import BuildRunner, EngineService
from loraserve.engine.setup import build_runner
from loraserve.messages import (
    Admit,
    Admitted,
    Copies,
    EngineCapabilities,
    EngineCounters,
    EngineLoad,
    EngineStatistics,
    Failed,
    FindCopies,
    Holder,
    OpenSlab,
    ReadSlab,
    SamplingParams,
    SlabChunk,
    SlabInfo,
    ToGateway,
    TokenBatch,
    ToMonitor,
    ToStore,
)
from loraserve.service import ServiceState
from loraserve.testing.clock import ReplaceableClock
from loraserve.testing.engine.ahead import StepsAheadRunner
from loraserve.testing.engine.offline import OfflineEngine, OfflineRequest, adapter_reference
from loraserve.testing.memory_bus import MemoryNetwork
from loraserve.testing.tiny_model import write_peft_adapter, write_tiny_model

PROMPT = tuple(range(5, 25))
TIMEOUT_S = 20.0


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)


class Models:
    """One tiny model with two adapters, and the tokens expected of each request."""

    prompt = PROMPT
    greedy = staticmethod(greedy)

    def __init__(self, root: Path) -> None:
        shape = write_tiny_model(root / "model", "llama")
        settings = EngineConfig(
            slab_dtype="float32",
            weights="float32",
            threads=1,
            kv_bytes=2 << 20,
            pool_bytes=1 << 20,
            max_step_tokens=16,
            max_running=8,
            load_interval_s=0.02,
            statistics_interval_s=0.02,
            load_timeout_s=TIMEOUT_S,
            load_chunk_bytes=4096,
        )
        self.config = Config(model=ModelConfig(path=str(root / "model")), engine=settings)
        self.slabs: dict[str, Slab] = {}
        self.folders = {name: root / name for name in ("one", "two")}
        for seed, (name, folder) in enumerate(self.folders.items()):
            write_peft_adapter(folder, shape, rank=8, seed=seed, strength=2.0)
            self.slabs[name] = pack_peft(folder, shape, "float32", 64)
        self.refs = {name: adapter_reference(name, slab) for name, slab in self.slabs.items()}
        self._offline = OfflineEngine(self.config, self.slabs)

    def expected(self, adapter: str, tokens: int) -> list[int]:
        request = OfflineRequest(prompt=PROMPT, sampling=greedy(tokens), adapter=adapter)
        return self._offline.generate([request])[0].tokens


class ScriptedStore:
    """A store that answers from ``slabs`` once ``open`` is set. ``holds`` may delay a chunk, ``corrupt`` change it."""

    def __init__(self, slabs: dict[str, Slab]) -> None:
        self.slabs = {slab.version: slab for slab in slabs.values()}
        self.open = asyncio.Event()
        self.open.set()
        self.corrupt: Callable[[bytes], bytes] = lambda chunk: chunk
        self.holds: Callable[[ReadSlab], bool] = lambda message: False
        self.slab_bytes_off = 0
        self.chunks_asked = 0

    async def serve(self, bus: Any) -> None:
        async with asyncio.TaskGroup() as tasks:
            while True:
                tasks.create_task(self._answer(bus, await bus.receive()))

    async def _answer(self, bus: Any, envelope: Envelope) -> None:
        message = envelope.message
        slab = self.slabs.get(message.version)
        if slab is None:
            bus.refuse(envelope, "not_found", "no such slab; register the adapter again")
        elif isinstance(message, OpenSlab):
            size = slab.header.slab_bytes + self.slab_bytes_off
            bus.respond(envelope, SlabInfo(version=slab.version, slab_bytes=size), [encode_header(slab.header)])
        elif isinstance(message, ReadSlab):
            self.chunks_asked += 1
            await self.open.wait()
            while self.holds(message):  # noqa: ASYNC110
                await asyncio.sleep(0.002)
            data = slab.data[message.offset_bytes : message.offset_bytes + message.length_bytes]
            chunk = SlabChunk(version=slab.version, offset_bytes=message.offset_bytes)
            bus.respond(envelope, chunk, [self.corrupt(bytes(data))])


DEADLY = 88_888
"""A token that makes a LateRunner lose its device."""


class Late:
    """A pending step whose result is delayed, so that the next step can start first."""

    def __init__(self, step: PendingStep) -> None:
        self._step = step

    def result(self) -> StepResult:
        time.sleep(0.003)
        return self._step.result()


class LateRunner(StepsAheadRunner):
    """The real runner as one that accepts steps ahead, as a GPU's does. Each result is late."""

    def submit(self, batch: StepBatch) -> PendingStep:
        if any(DEADLY in sequence.tokens for sequence in batch.sequences):
            raise DeviceLostError("CUDA error: an illegal memory access was encountered")
        return Late(super().submit(batch))


class Stage:
    """One engine with the store, gateway and monitor around it."""

    def __init__(
        self,
        models: Models,
        steps_ahead: int = 0,
        build: BuildRunner = build_runner,
        transfer: TransferConfig = TransferConfig(),  # noqa: B008
        **engine: Any,
    ) -> None:
        network = MemoryNetwork()
        self.models = models
        self.clock = ReplaceableClock()
        self.holders: tuple[Holder, ...] = ()
        """The peers that the monitor names as holders of each adapter."""
        settings = msgspec.structs.replace(models.config.engine, **engine)
        config = msgspec.structs.replace(models.config, engine=settings, transfer=transfer)

        def built(config: Config, progress: Callable[[str], None]) -> Runner:
            runner = build(config, progress)
            return LateRunner(runner, steps_ahead) if steps_ahead else runner

        bus = network.bus("engine-0", EngineService.inbox)
        self.engine = EngineService(config, bus, self.clock, built)
        self.store = ScriptedStore(models.slabs)
        self.gateway = network.bus("gateway-0", ToGateway)
        self.monitor = network.bus("monitor", ToMonitor)
        self._store_bus = network.bus("store", ToStore)
        self.tokens: dict[str, list[int]] = {}
        self.finish: dict[str, str] = {}
        self.failed: dict[str, Failed] = {}
        self.load: EngineLoad
        self.statistics: EngineStatistics
        self.capabilities: EngineCapabilities
        self._tasks: list[asyncio.Task[None]] = []
        self.running: asyncio.Task[None]
        self.network = network

    async def __aenter__(self) -> "Stage":
        work = (self.store.serve(self._store_bus), self._read_tokens(), self._read_load())
        self._tasks = [asyncio.create_task(w) for w in work]
        self.running = asyncio.create_task(self.engine.run())
        await self.until(lambda: self.engine.state is ServiceState.READY or self.running.done())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.engine.drain_timeout_s = 0.1
        self.engine.stop()
        await self.running
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def beside(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(work))

    def store_dies(self) -> None:
        """Stop the store as kill -9 would."""
        self._tasks.pop(0).cancel()
        self.network.kill("store")

    async def store_starts(self) -> None:
        """Start another store process, which first answers that it is starting."""
        bus = self.network.bus("store", ToStore)
        self.store.open.set()
        bus.refuse(await bus.receive(), "starting", "store is starting; ask again")
        self._tasks.insert(0, asyncio.create_task(self.store.serve(bus)))

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not condition():
                for task in self._tasks:
                    if task.done():
                        task.result()
                await asyncio.sleep(0.002)

    @property
    def counters(self) -> EngineCounters:
        return self.statistics.counters

    async def fresh_load(self) -> EngineLoad:
        """Return a load, statistics and capabilities that were reported after this call."""
        load, statistics = getattr(self, "load", None), getattr(self, "statistics", None)
        await self.until(lambda: getattr(self, "load", None) is not load)
        await self.until(lambda: getattr(self, "statistics", None) is not statistics)
        return self.load

    async def fresh_counters(self) -> EngineCounters:
        """Return counters that were reported after this call."""
        await self.fresh_load()
        return self.counters

    async def ask(self, message: Any, kind: type[Any]) -> Any:
        return await self.gateway.request("engine-0", message, kind, TIMEOUT_S)

    async def admit(self, name: str, adapter: str = "", tokens: int = 8, prompt: tuple[int, ...] = PROMPT) -> Admitted:
        self.tokens.setdefault(name, [])
        admit = Admit(
            request_id=name,
            gateway="gateway-0",
            prompt_tokens=prompt,
            sampling=greedy(tokens),
            adapter=self.models.refs[adapter] if adapter else None,
        )
        answer: Admitted = await self.ask(admit, Admitted)
        return answer

    async def finished(self, *names: str) -> None:
        await self.until(lambda: all(name in self.finish or name in self.failed for name in names))

    async def _read_tokens(self) -> None:
        while True:
            match (await self.gateway.receive()).message:
                case TokenBatch(incarnation=incarnation, deltas=deltas):
                    assert incarnation == self.engine.bus.incarnation
                    for delta in deltas:
                        assert delta.index == len(self.tokens[delta.request_id])
                        self.tokens[delta.request_id].extend(delta.tokens)
                        if delta.finish is not None:
                            self.finish[delta.request_id] = delta.finish
                case Failed() as failed:
                    self.failed[failed.request_id] = failed

    async def _read_load(self) -> None:
        while True:
            envelope = await self.monitor.receive()
            match envelope.message:
                case FindCopies(version=version):
                    self.monitor.respond(envelope, Copies(version=version, holders=self.holders))
                case EngineLoad() as load:
                    self.load = load
                case EngineStatistics() as statistics:
                    self.statistics = statistics
                case EngineCapabilities() as capabilities:
                    self.capabilities = capabilities


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    before = torch.get_num_threads()
    yield Models(tmp_path_factory.mktemp("engine"))
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def scripted_store() -> type[ScriptedStore]:
    return ScriptedStore


@pytest.fixture
def play(models: Models) -> Iterator[Callable[..., None]]:
    """Return a function that runs a scenario with one engine; keyword arguments override engine settings."""
    before = torch.get_num_threads()

    def run(scenario: Callable[[Stage], Coroutine[Any, Any, None]], **engine: Any) -> None:
        async def main() -> None:
            async with Stage(models, **engine) as stage:
                await scenario(stage)

        asyncio.run(main())

    yield run
    torch.set_num_threads(before)
