"""The real services with the parts replaced that would need a GPU, a disk, sockets or threads."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AsyncExitStack
from types import MappingProxyType, SimpleNamespace
from typing import Any, cast

from loraserve.bus.protocol import Bus, Envelope
from loraserve.clock import Clock
from loraserve.config import Config
from loraserve.engine.compute.protocol import Runner
from loraserve.engine.schedule.events import StepBatch, StepResult
from loraserve.engine.service import EngineService
from loraserve.errors import AdapterError
from loraserve.gateway.errors import unavailable
from loraserve.gateway.registry import STORE
from loraserve.gateway.service import DRAIN_POLL_S, LAST_ANSWERS_S, MONITOR, GatewayService
from loraserve.messages import AdapterRef, OpenSlab, Plan, ReadSlab
from loraserve.planner.plan_files import PlanFiles
from loraserve.store.registry import AdapterRecord, Snapshot
from loraserve.store.service import StoreService
from loraserve.testing.twin.model import TwinAdapter, TwinRunner, TwinTokenizer, twin_adapter

ENGINE_START_S = 0.3
STEP_S = 0.02
READ_S = 0.005


class VirtualSteps:
    """A StepExecutor whose steps take virtual time, one after the other."""

    def __init__(self) -> None:
        self._free_s = 0.0

    def call(self, function: Callable[..., Any], *arguments: Any) -> "asyncio.Future[Any]":
        return _later(ENGINE_START_S, lambda: function(*arguments))

    def submit(self, runner: Runner, batch: StepBatch) -> "asyncio.Future[StepResult]":
        now = asyncio.get_running_loop().time()
        self._free_s = max(now, self._free_s) + STEP_S
        return _later(self._free_s - now, lambda: runner.submit(batch).result())

    def close(self) -> None:
        """Do nothing: there are no threads."""


def _later(delay_s: float, function: Callable[[], Any]) -> "asyncio.Future[Any]":
    loop = asyncio.get_running_loop()
    result: asyncio.Future[Any] = loop.create_future()

    def call() -> None:
        if not result.done():
            try:
                result.set_result(function())
            except Exception as error:
                result.set_exception(error)

    loop.call_later(delay_s, call)
    return result


class InlineThreads:
    """A ThreadPoolExecutor that calls functions at once."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        result: Future[Any] = Future()
        try:
            result.set_result(function(*arguments))
        except Exception as error:
            result.set_exception(error)
        return result

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Do nothing: there are no threads."""


class TwinEngine(EngineService):
    """The engine with a TwinRunner."""

    def __init__(self, config: Config, bus: Bus, clock: Clock, steps_ahead: int) -> None:
        super().__init__(config, bus, clock, lambda config, _: TwinRunner(config.engine.pool_bytes, steps_ahead))
        self._executor = cast(Any, VirtualSteps())

    async def start(self, stack: AsyncExitStack) -> None:
        await super().start(stack)
        loader = self._adapters.loader
        loader._writers = loader._digesters = cast(Any, InlineThreads())


class TwinGateway(GatewayService):
    """The gateway without HTTP: clients call ``generation`` as the HTTP handlers do, and count in ``requests``."""

    requests = 0

    async def start(self, stack: AsyncExitStack) -> None:
        self.gateway = self._gateway(cast(Any, TwinTokenizer()), "base")
        self.story = self.gateway.stories.story
        for topic in ("load", "gone", "statistics"):
            self.bus.subscribe(MONITOR, topic)
        self.bus.subscribe(STORE, "registry")
        await self.gateway.registry.refresh()
        self.port = 0

    async def drain(self) -> None:
        """Finish the requests, or end them with an error after the timeout. Clients ask no draining gateway."""
        await self._finish_requests(self.config.gateway.drain_timeout_s)
        self.gateway.streams.fail_all(unavailable("This gateway is shutting down; try again", "shutting_down"))
        await self._finish_requests(LAST_ANSWERS_S)

    async def _finish_requests(self, timeout_s: float) -> None:
        deadline_s = self.clock.monotonic_s() + timeout_s
        while self.requests and self.clock.monotonic_s() < deadline_s:  # noqa: ASYNC110
            await asyncio.sleep(DRAIN_POLL_S)


class Disk:
    """What outlives a process: the store's adapters and the planner's files. Reads can be made slow or fail."""

    def __init__(self, adapters: tuple[str, ...]) -> None:
        self.adapters = {name: twin_adapter(name) for name in adapters}
        self.revision = 1
        self.plan: Plan | None = None
        self.drained: frozenset[str] = frozenset()
        self.delay_s = READ_S
        self.fails = False

    async def read(self) -> None:
        await asyncio.sleep(self.delay_s)
        if self.fails:
            raise AdapterError("storage", "the disk cannot be read")


class TwinPlanFiles(PlanFiles):
    """The planner's files on a Disk."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    def read_plan(self) -> Plan | None:
        return self._disk.plan

    def read_drained(self) -> frozenset[str]:
        return self._disk.drained

    def write_plan(self, plan: Plan) -> None:
        self._disk.plan = plan

    def write_drained(self, engines: Any) -> None:
        self._disk.drained = frozenset(engines)


class TwinAdapterStore:
    """The part of AdapterStore that the service uses, on a Disk."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self.registry = SimpleNamespace(snapshot=self._snapshot())
        self.slabs = self

    def register(self, name: str, path: str, replace: bool, now: float) -> tuple[AdapterRef, bool]:
        created = name not in self._disk.adapters
        if created:
            self._disk.adapters[name] = twin_adapter(name)
            self._disk.revision += 1
            self.registry.snapshot = self._snapshot()
        return twin_adapter(name).ref, created

    def open(self, version: str, now: float) -> Any:
        adapter = self._find(version)
        return SimpleNamespace(slab_bytes=adapter.ref.slab_bytes, header=adapter.header)

    def read(self, version: str, offset: int, length: int, now: float) -> bytes:
        return bytes(self._find(version).slab.data[offset : offset + length])

    def collect_garbage(self, now: float) -> list[str]:
        return []

    def close(self) -> None:
        """Do nothing: the Disk stays."""

    def _find(self, version: str) -> TwinAdapter:
        for adapter in self._disk.adapters.values():
            if adapter.ref.version == version:
                return adapter
        raise AdapterError("not_found", f"slab {version} is not in the store")

    def _snapshot(self) -> Snapshot:
        records = {
            name: AdapterRecord(
                name=name,
                version=adapter.ref.version,
                rank=adapter.ref.rank,
                slab_bytes=adapter.ref.slab_bytes,
                source="",
                created_unix_s=0.0,
            )
            for name, adapter in self._disk.adapters.items()
        }
        return Snapshot(self._disk.revision, MappingProxyType(records))


class TwinStore(StoreService):
    """The store on a Disk."""

    def __init__(self, config: Config, bus: Bus, clock: Clock, disk: Disk) -> None:
        super().__init__(config, bus, clock)
        self._disk = disk

    async def start(self, stack: AsyncExitStack) -> None:
        self._store = cast(Any, TwinAdapterStore(self._disk))

    async def handle(self, envelope: Envelope) -> None:
        if isinstance(envelope.message, OpenSlab | ReadSlab):
            self.spawn(self._read_slowly(envelope))
        else:
            await super().handle(envelope)

    async def _read_slowly(self, envelope: Envelope) -> None:
        await self._disk.read()
        await super().handle(envelope)
