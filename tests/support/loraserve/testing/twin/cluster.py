"""Runs one schedule: starts the processes, lets clients ask, applies the faults and waits until all is settled."""

import asyncio
import logging
from random import Random
from typing import Any

import msgspec
import structlog

from loraserve.config import (
    ClusterConfig,
    Config,
    EngineConfig,
    GatewayConfig,
    MonitorConfig,
    PlannerConfig,
    StoreConfig,
    TransferConfig,
)
from loraserve.errors import PeerError, RequestTimeoutError
from loraserve.gateway.context import Gateway
from loraserve.gateway.errors import ApiError
from loraserve.gateway.generation import ChoiceRequest, generation
from loraserve.gateway.text.output import StopRules
from loraserve.messages import AdapterRegistered, Ping, RegisterAdapter, Route
from loraserve.monitor.service import MonitorService
from loraserve.planner.service import PlannerService
from loraserve.router.service import RouterService
from loraserve.service import Service, ServiceState
from loraserve.testing.twin.checks import Answer, Outcome, judge_answers, judge_text, unsettled
from loraserve.testing.twin.model import BLOCK_TOKENS, KV_BLOCKS
from loraserve.testing.twin.network import OUTSIDE, TwinNetwork
from loraserve.testing.twin.processes import Process, ProcessLoop
from loraserve.testing.twin.schedule import (
    ADAPTERS,
    ENGINES,
    OTHERS,
    Ask,
    BadStore,
    Cut,
    Disturb,
    Kill,
    Pause,
    Register,
    Schedule,
    StepClock,
    Stop,
    fault_end_s,
)
from loraserve.testing.twin.services import READ_S, Disk, TwinEngine, TwinGateway, TwinPlanFiles, TwinStore

GATEWAY = "gateway-0"
POOL_BYTES = 3 * 4096
RETRY_S = 0.1
"""A client that is refused a connection, and an operator without an answer, try again after this time."""
ANSWER_S = 60.0
"""Longest time after the last fault and arrival until every request has ended."""
SETTLE_S = 30.0
"""Longest time after that until nothing is left of requests and faults."""
CHECK_S = 0.5


def twin_config(schedule: Schedule) -> Config:
    """Return the product's defaults, with small memories and longer intervals of reports."""
    return Config(
        cluster=ClusterConfig(engines=schedule.engines),
        engine=EngineConfig(
            device="cpu",
            slab_dtype="float16",
            threads=1,
            digest_threads=1,
            kv_bytes=KV_BLOCKS,
            block_tokens=BLOCK_TOKENS,
            pool_bytes=POOL_BYTES,
            host_cache_bytes=0,
            max_running=4,
            max_step_tokens=16,
            load_chunk_bytes=1024,
            load_interval_s=0.7,
            statistics_interval_s=2.0,
        ),
        monitor=MonitorConfig(publish_interval_s=0.7),
        planner=PlannerConfig(interval_s=schedule.plan_interval_s, prepare_timeout_s=10.0),
        store=StoreConfig(),
        gateway=GatewayConfig(),
        transfer=TransferConfig(transports=("tcp",)),
    )


class Running(msgspec.Struct):
    """A process that was started and has not been killed."""

    process: Process
    service: Service
    down_s: float = 0.05


class Cluster:
    """The processes of one run and the answers that clients got."""

    def __init__(self, schedule: Schedule, loop: ProcessLoop) -> None:
        self.schedule = schedule
        self.loop = loop
        self.config = twin_config(schedule)
        self.network = TwinNetwork(loop)
        self.disk = Disk(ADAPTERS)
        self.running: dict[str, Running] = {}
        self.answers: list[Answer] = []
        self.registered = set(ADAPTERS)
        self.violations: list[str] = []
        self._rng = Random(schedule.seed)
        self._operator = self.network.bus("operator", Ping, "0" * 16)
        self.network.processes["operator"] = Process(loop, "operator")

    @property
    def names(self) -> tuple[str, ...]:
        return (*reversed(OTHERS), *ENGINES[: self.schedule.engines])

    async def run(self) -> Outcome:
        for name in self.names:
            self.start(name)
        clients = []
        for happening in self.schedule.happenings:
            await asyncio.sleep(happening.at_s - self.loop.now_s)
            match happening:
                case Ask():
                    clients.append(self._spawn(self._ask(happening)))
                case Register():
                    clients.append(self._spawn(self._register(happening)))
                case _:
                    self._begin(happening)
        await self._wait_clients(clients)
        judge_answers(self.answers, self.schedule, self.violations)
        await self._settle()
        return Outcome(tuple(self.violations), len(self.answers), self.loop.now_s, self.network.trace)

    # --- Processes.

    def start(self, name: str) -> None:
        if self.loop.is_over:
            return
        kind, parts = self._kind(name)
        process = Process(self.loop, name)
        bus = self.network.bus(name, kind.inbox, f"{self._rng.getrandbits(64):016x}")
        self.network.processes[name] = process
        service = process.context.run(lambda: kind(self.config, bus, process.clock, **parts))
        running = self.running[name] = Running(process, service)
        process.spawn(self._supervise(running))

    def _kind(self, name: str) -> tuple[Any, dict[str, Any]]:
        """Return the class of a process's service, and its arguments beyond those of every service."""
        match name:
            case "gateway-0":
                return TwinGateway, {}
            case "router":
                return RouterService, {}
            case "monitor":
                return MonitorService, {}
            case "planner":
                return PlannerService, {"files": TwinPlanFiles(self.disk)}
            case "store":
                return TwinStore, {"disk": self.disk}
            case _:
                return TwinEngine, {"steps_ahead": self.schedule.steps_ahead}

    async def _supervise(self, running: Running) -> None:
        """Run a service and start it again when it has ended, as the supervisor does."""
        name = running.process.name
        try:
            await running.service.run()
        except Exception as error:
            self.violations.append(f"crash: {name}: {error!r}")
        if self.running.get(name) is running:
            self._end(name)
            self.loop.call_later(running.down_s, self.start, name, context=OUTSIDE)

    def abandon(self) -> None:
        """End all processes as kill -9 would."""
        self.loop.is_over = True
        self.network.close()
        for name in list(self.running):
            self.running.pop(name).process.kill()
        for task in self.loop.tasks:
            task.cancel()
        self.loop.call_later(0.1, self.loop.stop)
        self.loop.run_forever()

    def _end(self, name: str) -> Running:
        running = self.running.pop(name)
        self.network.kill(name)
        return running

    # --- Faults.

    def _begin(self, fault: Any) -> None:
        match fault:
            case Kill(process=name, down_s=down_s) if name in self.running:
                running = self._end(name)
                running.process.kill()
                self.loop.call_later(down_s, self.start, name, context=OUTSIDE)
            case Stop(process=name, down_s=down_s) if name in self.running:
                self.running[name].down_s = down_s
                self.running[name].process.call(self.running[name].service.stop)
            case Pause(process=name) if name in self.running and not self.running[name].process.paused:
                self.running[name].process.pause()
                self._later(fault, self._resume, self.running[name])
            case Disturb():
                self.network.disturb(fault)
                self._later(fault, self.network.calm, fault)
            case Cut():
                self.network.cut(fault)
                self._later(fault, self.network.mend, fault)
            case BadStore(delay_s=delay_s, fails=fails):
                self.disk.delay_s, self.disk.fails = delay_s, fails
                self._later(fault, self._repair_disk)
            case StepClock(process=name, step_s=step_s) if name in self.running:
                self.running[name].process.clock.unix_step_s += step_s

    def _later(self, fault: Any, function: Any, *arguments: Any) -> None:
        self.loop.call_at(fault_end_s(fault), function, *arguments, context=OUTSIDE)

    def _resume(self, running: Running) -> None:
        if self.running.get(running.process.name) is running:
            running.process.resume()

    def _repair_disk(self) -> None:
        self.disk.delay_s, self.disk.fails = READ_S, False

    # --- Clients.

    async def _ask(self, ask: Ask) -> None:
        answer = Answer(len(self.answers), ask, self.loop.now_s)
        self.answers.append(answer)
        while True:
            running = self.running.get(GATEWAY)
            service = running.service if running is not None else None
            # The supervisor's socket keeps connections until a gateway accepts them.
            if running is not None and isinstance(service, TwinGateway) and service.state is ServiceState.READY:
                break
            await asyncio.sleep(RETRY_S)
        answer.accepted_s = self.loop.now_s
        handling = running.process.spawn(self._handle(service, answer))
        if ask.leaves_after_s is not None:
            self.loop.call_later(ask.leaves_after_s, self._leave, running.process, handling, answer, context=OUTSIDE)
        await asyncio.wait([handling])
        if handling.cancelled():
            answer.end("killed", self.loop.now_s)
        else:
            handling.result()

    def _leave(self, process: Process, handling: "asyncio.Task[None]", answer: Answer) -> None:
        if not handling.done():
            answer.end("left", self.loop.now_s)
            process.call(handling.cancel)

    async def _handle(self, service: TwinGateway, answer: Answer) -> None:
        """Answer a request as the gateway's HTTP handlers do."""
        service.requests += 1
        try:
            timeout_s = self.config.gateway.request_timeout_s
            async with asyncio.timeout(timeout_s):
                await self._generate(service.gateway, answer)
            answer.end("ok", self.loop.now_s)
        except ApiError as error:
            answer.end(error.code or "error", self.loop.now_s, error.message)
        except TimeoutError:
            answer.end("timed_out", self.loop.now_s)
        finally:
            service.requests -= 1

    async def _generate(self, gateway: Gateway, answer: Answer) -> None:
        ask, arrived_s = answer.ask, gateway.clock.monotonic_s()
        model = await gateway.resolve(ask.adapter or "base")
        route = Route(
            request_id=f"r{answer.number}.{gateway.bus.incarnation[:4]}-0",
            gateway=gateway.bus.name,
            prompt_tokens=ask.prompt,
            sampling=ask.sampling,
            adapter=model.adapter,
        )
        choice = ChoiceRequest(prompt=0, param="prompt", route=route, rules=StopRules(), skip_special_tokens=True)
        async with generation(gateway, [choice], arrived_s) as run:
            while (chunk := await run.next_chunk()) is not None:
                answer.text += chunk.text
                answer.finish = chunk.finish
                judge_text(answer, self.violations)

    async def _register(self, register: Register) -> None:
        message = RegisterAdapter(name=register.name, path=f"/{register.name}")
        while True:
            try:
                await self._operator.request("store", message, AdapterRegistered, 1.0)
                break
            except (RequestTimeoutError, PeerError):
                await asyncio.sleep(RETRY_S)
        self.registered.add(register.name)
        await self._ask(Ask(at_s=self.loop.now_s, adapter=register.name, prompt=(7, 8, 9), max_tokens=5))

    def _spawn(self, work: Any) -> "asyncio.Task[None]":
        return self.loop.create_task(work, context=OUTSIDE.copy())

    async def _wait_clients(self, clients: "list[asyncio.Task[None]]") -> None:
        last_s = max((fault_end_s(fault) for fault in self.schedule.faults), default=0.0)
        timeout_s = max(last_s, self.loop.now_s) + ANSWER_S - self.loop.now_s
        if clients:
            _, late = await asyncio.wait(clients, timeout=timeout_s)
            self.violations += [f"no end: {a.describe()}" for a in self.answers if not a.outcome]
            for task in [*late, *(task for task in clients if task not in late)]:
                if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                    raise error
        left_s = last_s - self.loop.now_s
        if left_s > 0:
            await asyncio.sleep(left_s)

    async def _settle(self) -> None:
        """Wait until the cluster is as if nothing had happened, then ask once more with an adapter and without."""
        if self.violations:
            return
        deadline_s = self.loop.now_s + SETTLE_S
        while left := unsettled(self):
            if self.loop.now_s > deadline_s:
                self.violations += [f"not settled: {each}" for each in left]
                return
            await asyncio.sleep(CHECK_S)
        known = len(self.answers)
        adapter = self._rng.choice(sorted(self.registered))
        probe = Ask(at_s=self.loop.now_s, prompt=(1, 2, 3), max_tokens=2, adapter=adapter)
        await asyncio.wait_for(self._ask(probe), ANSWER_S)
        answer = self.answers[known]
        if answer.outcome != "ok":
            self.violations.append(f"not settled: the last request failed: {answer.describe()}")


def run_schedule(schedule: Schedule) -> Outcome:
    """Run one schedule in an event loop of its own and return what was found."""
    loop = ProcessLoop()
    cluster = Cluster(schedule, loop)
    try:
        outcome: Outcome = loop.run_until_complete(loop.create_task(cluster.run()))
        return outcome
    finally:
        cluster.abandon()
        loop.close()


def silence_logs() -> None:
    """Drop all log lines of the product, because writing them would take most of the time of a run."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL), cache_logger_on_first_use=True
    )
