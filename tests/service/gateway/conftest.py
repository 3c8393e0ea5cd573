"""The real gateway with its HTTP server, in front of a small scripted cluster."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from openai import AsyncOpenAI

from loraserve.bus.protocol import Bus, Envelope
from loraserve.clock import SystemClock
from loraserve.config import Config, load_config
from loraserve.gateway.service import GatewayService
from loraserve.messages import (
    Abort,
    AdapterList,
    AdapterRef,
    AdapterRegistered,
    AdapterUnregistered,
    ClusterLoad,
    ClusterStatistics,
    Drain,
    EngineCounters,
    EngineSeen,
    Expect,
    Failed,
    GetPlan,
    ListAdapters,
    Ping,
    Placement,
    Plan,
    Pong,
    PrefetchCounts,
    Rebalance,
    RebalanceDone,
    RegisterAdapter,
    RegistryChanged,
    Rejected,
    Route,
    Routed,
    ToEngine,
    ToGateway,
    TokenBatch,
    TokenDelta,
    ToMonitor,
    ToPlanner,
    ToRouter,
    ToStore,
    UnregisterAdapter,
)
from loraserve.testing.memory_bus import MemoryNetwork
from loraserve.testing.reports import engine_seen
from loraserve.testing.tiny_tokenizer import CHAT_END, write_tiny_tokenizer

MODEL = "tiny"
CONTEXT = 256


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_tiny_tokenizer(directory)
    config = {"model_type": "llama", "vocab_size": 320, "max_position_embeddings": CONTEXT}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@dataclass
class Reply:
    """The answer of an engine: ``text``, token by token. {seed} is replaced by the seed of the choice.

    The engine pauses before token number ``pause_at`` until ``go`` is set. With ``fail`` it sends Failed at the end.
    """

    text: str = "hello world"
    finish: str = "stop"
    end_token: bool = True
    delay_s: float = 0.0
    pause_at: int | None = None
    go: asyncio.Event = field(default_factory=asyncio.Event)
    fail: str = ""
    cached_tokens: int = 0
    skip_index: int | None = None


@dataclass
class FakeCluster:
    """Router, store, monitor, planner and two engines on one in-memory bus. They record every message."""

    network: MemoryNetwork
    encode: Callable[[str], list[int]]
    end_token: int
    replies: dict[str, Reply] = field(default_factory=lambda: {"": Reply()})
    reject: Rejected | None = None
    route_silent: bool = False
    route_delay_s: float = 0.0
    tokens_before_routed: bool = False
    engines: list[str] = field(default_factory=lambda: ["engine-0", "engine-1"])
    dead: set[str] = field(default_factory=set)
    unheard: set[str] = field(default_factory=set)
    """Engines that the monitor declares dead although they answer."""
    unreachable: set[str] = field(default_factory=set)
    incarnations: dict[str, str] = field(default_factory=lambda: {"engine-0": "e0" * 8, "engine-1": "e1" * 8})
    adapters: dict[str, AdapterRef] = field(default_factory=dict)
    revision: int = 1
    publishes_registry: bool = True
    routes: list[Route] = field(default_factory=list)
    expected: list[tuple[Expect, int]] = field(default_factory=list)
    """The Expect messages, each with the number of requests routed before it."""
    aborts: list[tuple[str, str]] = field(default_factory=list)
    lists_asked: int = 0
    playing: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    buses: dict[str, Bus] = field(default_factory=dict)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def start(self) -> None:
        inboxes: dict[str, Any] = {"router": ToRouter, "store": ToStore, "monitor": ToMonitor, "planner": ToPlanner}
        inboxes |= dict.fromkeys(self.engines, ToEngine)
        for name, inbox in inboxes.items():
            self.start_one(name, inbox)
        self.tasks.append(asyncio.create_task(self.publish()))

    def start_one(self, name: str, inbox: Any) -> None:
        """Start a process, or restart one that the network has killed."""
        self.buses[name] = self.network.bus(name, inbox)
        self.tasks.append(asyncio.create_task(self.serve(name)))

    async def stop(self) -> None:
        for task in (*self.tasks, *self.playing.values()):
            task.cancel()
        await asyncio.gather(*self.tasks, *self.playing.values(), return_exceptions=True)
        for bus in self.buses.values():
            await bus.close()

    async def serve(self, name: str) -> None:
        bus = self.buses[name]
        while True:
            envelope = await bus.receive()
            if name not in self.unreachable:
                self.answer(name, bus, envelope)

    def answer(self, name: str, bus: Bus, envelope: Envelope) -> None:
        match envelope.message:
            case Ping() if name not in self.dead:
                incarnation = self.incarnations.get(name, bus.incarnation)
                bus.respond(envelope, Pong(name=name, state="READY", incarnation=incarnation, pid=1, protocol=1))
            case Route() as route:
                self.tasks.append(asyncio.create_task(self.route(bus, envelope, route)))
            case Expect() as expect:
                self.expected.append((expect, len(self.routes)))
            case Abort(request_id=request_id):
                self.aborts.append((name, request_id))
                if request_id in self.playing:
                    self.playing[request_id].cancel()
            case ListAdapters():
                self.lists_asked += 1
                bus.respond(envelope, AdapterList(revision=self.revision, adapters=tuple(self.adapters.values())))
            case RegisterAdapter() as register:
                self.register(bus, envelope, register)
            case UnregisterAdapter(name=adapter):
                if self.adapters.pop(adapter, None) is None:
                    bus.refuse(envelope, "not_found", f"{adapter} is not registered")
                else:
                    self.revision += 1
                    bus.respond(envelope, AdapterUnregistered(name=adapter))
            case GetPlan():
                bus.respond(envelope, self.plan())
            case Drain(engine=engine, on=on) if engine in ("engine-0", "engine-1"):
                plan = msgspec.structs.replace(self.plan(), drained=(engine,) if on else ())
                bus.respond(envelope, RebalanceDone(plan=plan, moves=(), applied=True))
            case Drain(engine=engine):
                bus.refuse(envelope, "unknown_engine", f"there is no engine {engine}; there are engine-0, engine-1")
            case Rebalance(dry_run=dry_run):
                bus.respond(envelope, RebalanceDone(plan=self.plan(), moves=(), applied=not dry_run, message="nothing"))

    def plan(self) -> Plan:
        copies = (Placement(version="v" * 8, name="pirate", engine="engine-0", share=1.0),)
        return Plan(epoch=3, created_unix_s=0.0, placements=copies)

    def register(self, bus: Bus, envelope: Envelope, register: RegisterAdapter) -> None:
        if "broken" in register.path:
            bus.refuse(envelope, "bad_shape", "lora_A has 5 columns, the model has 64")
            return
        known = self.adapters.get(register.name)
        if known is not None and known.version != f"digest-of-{register.path}" and not register.replace:
            bus.refuse(envelope, "duplicate", "it has other content")
            return
        created = self.add_adapter(register.name, f"digest-of-{register.path}")
        bus.respond(envelope, AdapterRegistered(adapter=self.adapters[register.name], created=created))

    def add_adapter(self, name: str, version: str = "") -> bool:
        adapter = AdapterRef(name=name, version=version or f"digest-of-{name}", rank=8, slab_bytes=1000)
        created = self.adapters.get(name) != adapter
        self.adapters[name] = adapter
        self.revision += 1
        return created

    async def publish(self) -> None:
        sequence = 0
        while True:
            sequence += 1
            engines = tuple(self.seen(name) for name in self.engines)
            load = ClusterLoad(incarnation="monitor-1", sequence=sequence, engines=engines)
            self.buses["monitor"].publish("load", load)
            prefetched = PrefetchCounts(kind="plan", loaded_bytes=30, useful_bytes=20, wasted_bytes=10)
            counters = dict.fromkeys(self.engines, EngineCounters(prefetched=(prefetched,)))
            self.buses["monitor"].publish("statistics", ClusterStatistics(engines=counters))
            if self.publishes_registry:
                news = RegistryChanged(revision=self.revision, adapters=tuple(self.adapters.values()))
                self.buses["store"].publish("registry", news)
            await asyncio.sleep(0.05)

    def seen(self, name: str) -> EngineSeen:
        dead = name in self.dead | self.unheard
        return engine_seen(
            name,
            age_s=5.0 if dead else 0.0,
            alive=not dead,
            incarnation=self.incarnations[name],
            running=len(self.playing),
            request_ids=tuple(self.playing),
            kv_blocks=100,
            kv_blocks_free=75,
            pool_bytes=1000,
            pool_free_bytes=400,
            max_model_tokens=CONTEXT,
        )

    async def route(self, bus: Bus, envelope: Envelope, route: Route) -> None:
        self.routes.append(route)
        if self.route_silent:
            return
        await asyncio.sleep(self.route_delay_s)
        if self.reject is not None:
            bus.respond(envelope, msgspec.structs.replace(self.reject, request_id=route.request_id))
            return
        alive = [name for name in self.engines if name not in self.dead]
        if not alive:
            bus.respond(envelope, Rejected(request_id=route.request_id, code="no_engine", message="no engine is ready"))
            return
        engine = next((name for name in alive if name not in route.avoid), alive[0])
        incarnation = self.incarnations[engine]
        task = asyncio.create_task(self.play(engine, incarnation, route))
        self.playing[route.request_id] = task
        task.add_done_callback(lambda _: self.playing.pop(route.request_id, None))
        if self.tokens_before_routed:
            await asyncio.sleep(0.05)
        bus.respond(envelope, Routed(request_id=route.request_id, engine=engine, incarnation=incarnation, why="test"))

    async def play(self, engine: str, incarnation: str, route: Route) -> None:
        reply = self.replies.get(route.adapter.name if route.adapter else "") or self.replies[""]
        tokens = self.encode(reply.text.replace("{seed}", str(route.sampling.seed)))
        if reply.finish == "stop" and reply.end_token:
            tokens = [*tokens, self.end_token]
        tokens = tokens[: route.sampling.max_tokens]
        for index, token in list(enumerate(tokens))[route.generated :]:
            if index == reply.pause_at:
                await reply.go.wait()
            await asyncio.sleep(reply.delay_s)
            last = index == len(tokens) - 1
            if index == reply.skip_index:
                continue
            if reply.fail and last:
                failed = Failed(request_id=route.request_id, engine=engine, code=reply.fail, message="why")
                self.buses[engine].send(route.gateway, failed)
                return
            finish = reply.finish if last else None
            if last and finish == "stop" and token != self.end_token and reply.end_token:
                finish = "length"
            scored = self.scores(route, token)
            delta = TokenDelta(route.request_id, index, (token,), finish, reply.cached_tokens, scored)
            batch = TokenBatch(engine=engine, incarnation=incarnation, deltas=(delta,))
            self.buses[engine].send(route.gateway, batch)

    def scores(self, route: Route, token: int) -> tuple[tuple[float, tuple[tuple[int, float], ...]], ...]:
        wanted = route.sampling.logprobs
        if wanted is None:
            return ()
        return ((-0.5, tuple((token + rank, -0.5 - rank) for rank in range(wanted))),)


@dataclass
class Running:
    """A running gateway that answers on ``url``."""

    service: GatewayService
    cluster: FakeCluster
    url: str
    http: aiohttp.ClientSession

    @property
    def openai(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=20)

    async def post(self, path: str, body: Any) -> tuple[int, Any]:
        """Return the status and the decoded answer."""
        async with self.http.post(self.url + path, json=body) as response:
            is_json = response.content_type == "application/json"
            return response.status, (await response.json() if is_json else await response.text())

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.http.get(self.url + path) as response:
            is_json = response.content_type == "application/json"
            return response.status, (await response.json() if is_json else await response.text())

    async def events(self, path: str, body: Any) -> list[Any]:
        """Return all events of a streamed answer, decoded; the last is "[DONE]"."""
        async with self.http.post(self.url + path, json=body) as response:
            assert response.status == 200, await response.text()
            return parse_events(await response.text())

    async def until(self, condition: Callable[[], Any], what: str) -> None:
        """Wait until the condition holds; ``what`` describes it in the error."""
        for _ in range(500):
            if condition():
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"this did not happen in 5 s: {what}")


def parse_events(text: str) -> list[Any]:
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line if line == "[DONE]" else json.loads(line) for line in (line.removeprefix("data: ") for line in lines)]


Start = Callable[..., AbstractAsyncContextManager[Running]]


@pytest.fixture
def start_gateway(model_dir: Path) -> Start:
    """Return a context manager that runs a gateway with given settings and checks at the end that no stream is left."""

    @asynccontextmanager
    async def start(*settings: str, adapters: Sequence[str] = ("pirate", "me/x:1")) -> AsyncIterator[Running]:
        fixed = (f"model.path={model_dir}", f"model.name={MODEL}", "gateway.port=0", "monitor.dead_after_s=0.3")
        config: Config = load_config(environ={}, overrides=[*fixed, *settings])
        network = MemoryNetwork()
        tokenizer = write_tiny_tokenizer(model_dir)
        end_token = tokenizer.token_to_id(CHAT_END)
        assert end_token is not None
        cluster = FakeCluster(network, lambda text: list(tokenizer.encode(text).ids), end_token)
        for name in adapters:
            cluster.add_adapter(name)
        cluster.start()
        service = GatewayService(config, network.bus("gateway-0", ToGateway), SystemClock())
        task = asyncio.create_task(service.run())
        try:
            await wait_ready(service, task)
            async with aiohttp.ClientSession() as http:
                running = Running(service, cluster, f"http://127.0.0.1:{service.port}", http)
                yield running
                await running.until(lambda: not len(service.gateway.streams), "all streams closed")
                service.gateway.streams.validate()
        finally:
            service.stop()
            await task
            await cluster.stop()

    return start


async def wait_ready(service: GatewayService, task: "asyncio.Task[None]") -> None:
    for _ in range(2000):
        if task.done():
            task.result()
        if service.state == "READY" and service.gateway.streams.watch.cluster is not None:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"the gateway did not get ready, it is {service.state}")
