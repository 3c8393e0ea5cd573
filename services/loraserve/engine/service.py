"""The engine process: passes messages to the scheduler and executes the instructions that it returns.

The scheduler decides (schedule/scheduler.py). The runner computes in its own thread (compute/protocol.py). setup.py
builds the objects that load adapters and lend them to peers. This module connects them:

    message ----> handle() ----> _handle_event() ----> Scheduler.handle() ----> _execute() ----> step, load, message
                                       ^                                                            |
                                       +------------- StepDone, AdapterLoaded, ... -----------------+
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import msgspec

from loraserve.bus.protocol import Bus, Envelope
from loraserve.clock import Clock
from loraserve.config import Config
from loraserve.cost import StepShape
from loraserve.engine.compute.protocol import DeviceLostError, Runner, StepExecutor
from loraserve.engine.lending.leases import LeaseReader
from loraserve.engine.schedule.events import (
    AdapterDamaged,
    AdapterExpected,
    AdapterLoaded,
    CancelLoad,
    CopiesRequested,
    CopiesRetired,
    Emit,
    Event,
    EvictAdapter,
    HandOver,
    Instruction,
    LeasesEnded,
    LoadAdapter,
    PlanReady,
    Reject,
    RequestAborted,
    RequestArrived,
    RunStep,
    StepBatch,
    StepDone,
    StepFailed,
    StepResult,
)
from loraserve.engine.schedule.report import SpeedMeter, describe_capabilities, step_shape
from loraserve.engine.schedule.scheduler import Scheduler
from loraserve.engine.setup import AdapterParts, build_runner, engine_number, scheduler_limits, wire_adapters
from loraserve.messages import (
    Abort,
    Admit,
    Admitted,
    AnnounceCapabilities,
    ConnectQueue,
    EngineGone,
    EngineLoad,
    EngineStatistics,
    ExpectAdapter,
    Failed,
    LeaseSlab,
    Prepared,
    PreparePlan,
    ReadRegion,
    ReleaseLease,
    RenewLease,
    RetireCopies,
    RetireDone,
    SlabDamaged,
    ToEngine,
    TokenBatch,
    TokenDelta,
)
from loraserve.service import Service, ServiceState

LAST_STEP_S = 5.0
"""Time for the step in flight after the requests were handed over."""

BuildRunner = Callable[[Config, Callable[[str], None]], Runner]


class EngineService(Service):
    """The service of one engine. It is ready once the model is loaded and the kernels are compiled."""

    inbox = ToEngine

    def __init__(self, config: Config, bus: Bus, clock: Clock, build: BuildRunner | None = None) -> None:
        super().__init__(config, bus, clock)
        self.drain_timeout_s = config.engine.drain_timeout_s + LAST_STEP_S
        self._build = build or partial(build_runner, index=engine_number(bus.name))
        self._executor = StepExecutor()
        # One loop awaits the steps, so that their results reach the scheduler in order, failures included.
        self._steps: asyncio.Queue[tuple[StepBatch, StepShape, asyncio.Future[StepResult]]] = asyncio.Queue()
        self._speed = SpeedMeter()
        # Plan requests without an answer. Requests with the same epoch are answered in order of arrival.
        self._preparing: list[Envelope] = []
        self._idle = asyncio.Event()
        self._idle.set()
        self._leaks = 0
        self._checked_while_idle = False
        self._runner: Runner
        self._scheduler: Scheduler
        self._adapters: AdapterParts

    async def start(self, stack: AsyncExitStack) -> None:
        stack.callback(self._executor.close)
        self._runner = await self._executor.call(self._build, self.config, self._report_progress)
        self._scheduler = Scheduler(scheduler_limits(self.config, self._runner))
        self.story = self._scheduler.story
        residency = self._scheduler.residency
        self._adapters = wire_adapters(self, self._runner, residency, self._speed, self._handle_event, stack)

    def loops(self) -> list[Coroutine[Any, Any, None]]:
        return [self._report_load(), self._report_statistics(), self._await_steps()]

    async def drain(self) -> None:
        """Wait for the running requests, then hand over the remaining ones. New requests are refused meanwhile."""
        self._send_load()
        try:
            async with asyncio.timeout(self.config.engine.drain_timeout_s):
                await self._idle.wait()
        except TimeoutError:
            self._handle_event(HandOver())
            await self._idle.wait()

    def ready_detail(self) -> str:
        limits, resident = self._scheduler.limits, self._scheduler.load().adapters.resident
        return (
            f"{self._runner.weights_backend} weights, KV for {limits.kv_blocks * limits.block_tokens} tokens, "
            f"pool of {limits.pool_bytes >> 20} MiB, {len(resident)} adapters resident"
        )

    async def handle(self, envelope: Envelope) -> None:
        lender, offers, now = self._adapters.lender, self._adapters.offers, self.clock.monotonic_s()
        match envelope.message:
            case Admit() as admit:
                self._admit(envelope, admit)
            case Abort(request_id=request_id):
                self._handle_event(RequestAborted(request_id))
            case ExpectAdapter(adapter=adapter):
                if self.state is ServiceState.READY:
                    self._handle_event(AdapterExpected(adapter))
            case PreparePlan(epoch=epoch, adapters=adapters):
                self._preparing.append(envelope)
                self._handle_event(CopiesRequested(epoch, adapters))
            case RetireCopies(epoch=epoch, keep=keep):
                before = self._count_pinned()
                self._handle_event(CopiesRetired(epoch, keep))
                self.bus.respond(envelope, RetireDone(epoch=epoch, unpinned=before - self._count_pinned()))
            case AnnounceCapabilities():
                self._announce_capabilities()
            case LeaseSlab() | RenewLease() | ReleaseLease():
                self._note_leases_ended(lender.answer(envelope, now))
            case SlabDamaged() as complaint:
                if lender.accept_complaint(envelope.sender, complaint):
                    self.spawn(self._check_copies(complaint.version))
            case ReadRegion():
                answering = offers.answer_read(envelope)
                if answering is not None:
                    self.spawn(answering)
            case ConnectQueue():
                self.spawn(offers.connect(envelope))
            case EngineGone(engine=engine, incarnation=incarnation):
                self._note_leases_ended(lender.end_reader(LeaseReader(engine, incarnation), now))
                offers.forget(engine, incarnation)
                self._adapters.sources.forget(engine, incarnation)

    # --- Events and instructions.

    def _admit(self, envelope: Envelope, admit: Admit) -> None:
        """Accept or reject the request at once. After a rejection the router can choose another engine."""
        rejected: dict[str, Reject] = {}
        if self.state == ServiceState.DRAINING and admit.request_id not in self._scheduler.load().queue.request_ids:
            text = f"{self.bus.name} is draining"
            rejected[admit.request_id] = Reject(admit.request_id, admit.gateway, "draining", text)
        else:
            if admit.adapter is not None:
                self._adapters.cache.cache.uses.add(admit.adapter.version, self.clock.monotonic_s())
            self._handle_event(RequestArrived(admit), rejected)
        answer = Admitted(request_id=admit.request_id, incarnation=self.bus.incarnation)
        reject = rejected.get(admit.request_id)
        if reject is not None:
            answer = msgspec.structs.replace(answer, ok=False, code=reject.code, message=reject.message)
        self.bus.respond(envelope, answer)

    def _handle_event(self, event: Event, rejected: dict[str, Reject] | None = None) -> None:
        """Pass an event to the scheduler and execute the returned instructions.

        If ``rejected`` is given, Reject instructions are stored there by request id instead of being sent.
        """
        deltas: dict[str, list[TokenDelta]] = defaultdict(list)
        for instruction in self._scheduler.handle(event, self.clock.monotonic_s()):
            if isinstance(instruction, Emit):
                deltas[instruction.gateway].append(instruction.delta)
            elif isinstance(instruction, Reject) and rejected is not None:
                rejected[instruction.request_id] = instruction
            else:
                self._execute(instruction)
        self._checked_while_idle = False
        (self._idle.set if self._scheduler.is_idle else self._idle.clear)()
        for gateway, batch in deltas.items():
            self.bus.send(
                gateway,
                TokenBatch(engine=self.bus.name, incarnation=self.bus.incarnation, deltas=tuple(batch)),
            )

    def _execute(self, instruction: Instruction) -> None:
        match instruction:
            case RunStep(batch):
                # Submitted before the tokens of the previous step are sent, so that sending overlaps with computing.
                step = self._executor.submit(self._runner, batch)
                self._steps.put_nowait((batch, self._shape_of(batch), step))
            case LoadAdapter() as load:
                self.spawn_vital(self._load_adapter(load))
            case CancelLoad(version):
                self._adapters.loader.cancel(version)
            case EvictAdapter(version, slot, name, reason, left):
                self._runner.remove(slot)
                if left is not None and left.slab is not None:
                    saving = self._adapters.cache.keep(left, left.slab)
                    if saving is not None:
                        self.spawn(saving)
                self.log.info("adapter_evicted", adapter=name, version=version, slot=slot, reason=reason)
            case Reject(request_id, gateway, code, message):
                self.log.warning("request_failed", request=request_id, code=code, reason=message)
                failed = Failed(request_id=request_id, engine=self.bus.name, code=code, message=message)
                self.bus.send(gateway, failed)
            case PlanReady(epoch, failed_copies):
                self._answer_plan(epoch, failed_copies)

    def _answer_plan(self, epoch: int, failed: dict[str, str]) -> None:
        answer = Prepared(engine=self.bus.name, incarnation=self.bus.incarnation, epoch=epoch, failed=failed)
        request = next(envelope for envelope in self._preparing if envelope.message.epoch == epoch)
        self._preparing.remove(request)
        self.bus.respond(request, answer)

    # --- Steps.

    def _shape_of(self, batch: StepBatch) -> StepShape:
        """Return the step's shape for the cost model. Call it before the adapters' slots can change."""
        adapters = {entry.slot: entry.adapter for entry in self._scheduler.residency.pool.entries()}
        return step_shape(batch, adapters)[0]

    async def _await_steps(self) -> None:
        while True:
            await self._await_step(*await self._steps.get())

    async def _await_step(self, batch: StepBatch, shape: StepShape, step: asyncio.Future[StepResult]) -> None:
        try:
            result = await step
        except DeviceLostError as error:
            # All further steps would fail, so the process ends and the supervisor restarts it.
            self.log.critical("device_lost", step=batch.step_id, reason=str(error))
            raise
        except Exception as error:
            self.log.exception("step_failed", step=batch.step_id, requests=[s.request_id for s in batch.sequences])
            self._handle_event(StepFailed(batch.step_id, f"{self.bus.name} could not compute a step: {error}"))
            return
        self._speed.record_step(shape, result.duration_s)
        self._handle_event(StepDone(result))

    # --- Adapters.

    async def _load_adapter(self, load: LoadAdapter) -> None:
        result = await self._adapters.loader.load(load)
        if isinstance(result, AdapterLoaded) and result.slab is not None:
            self._speed.record_load(load.adapter.slab_bytes, result.slab.own_s)
        self._handle_event(result)

    async def _check_copies(self, version: str) -> None:
        if await self._adapters.lender.check_copies(version, self._adapters.loader):
            self._handle_event(AdapterDamaged(version))

    def _note_leases_ended(self, any_ended: bool) -> None:
        if any_ended:
            self._handle_event(LeasesEnded())

    def _count_pinned(self) -> int:
        return sum(adapter.pinned for adapter in self._scheduler.load().adapters.resident)

    # --- Reports.

    def _report_progress(self, text: str) -> None:
        self.starting_detail = text
        self.log.info("starting_up", step=text)

    async def _report_load(self) -> None:
        self._announce_capabilities()
        while True:
            self._note_leases_ended(self._adapters.lender.expire(self.clock.monotonic_s()))
            self._send_load()
            await asyncio.sleep(self.config.engine.load_interval_s)

    def _send_load(self) -> None:
        load = self._scheduler.load()
        report = EngineLoad(
            engine=self.bus.name,
            incarnation=self.bus.incarnation,
            state=self.state,
            queue=load.queue,
            memory=load.memory,
            speed=self._speed.measured(),
            adapters=msgspec.structs.replace(load.adapters, cached=self._adapters.cache.cache.versions),
        )
        self.bus.send("monitor", report)

    async def _report_statistics(self) -> None:
        while True:
            self._check_for_leaks()
            reads = self._adapters.loader.counts()
            statistics = EngineStatistics(
                engine=self.bus.name,
                incarnation=self.bus.incarnation,
                counters=msgspec.structs.replace(self._scheduler.counters(), leaks=self._leaks, reads=reads),
                adapter_tokens=self._scheduler.counts.by_adapter(),
            )
            self.bus.send("monitor", statistics)
            self._scheduler.counts.mark_reported()
            await asyncio.sleep(self.config.engine.statistics_interval_s)

    def _announce_capabilities(self) -> None:
        capabilities = describe_capabilities(self._scheduler, self.bus.name, self.bus.incarnation)
        offers = self._adapters.offers
        self.bus.send(
            "monitor",
            msgspec.structs.replace(capabilities, abilities=offers.abilities, cache_abilities=offers.cache_abilities),
        )

    def _check_for_leaks(self) -> None:
        """If the engine is idle, count a leak if KV blocks are still in use or an invariant is broken.

        The check scans all blocks, so it runs only once per idle period.
        """
        if self._checked_while_idle or not self._scheduler.is_idle:
            return
        self._checked_while_idle = True
        try:
            self._scheduler.validate()
            self._adapters.lender.validate()
            self._adapters.cache.validate()
            assert self._scheduler.blocks.free == self._scheduler.limits.kv_blocks, "KV blocks are used by no request"
        except AssertionError as error:
            self._leaks += 1
            self.log.error("leak", reason=str(error))
