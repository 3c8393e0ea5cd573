"""The engine process: carries messages to the scheduler, and its instructions to the runner, the loader and gateways.

Everything that decides is in scheduler.py; everything that computes is in runner.py, in one worker thread, so that
messages are answered and slabs arrive while a step runs. Where the runner takes steps ahead, a second thread waits for
its results, so that the first can hand it the next step.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, TypeVar

import msgspec

from loraserve.bus.protocol import Bus, Envelope
from loraserve.clock import Clock
from loraserve.config import Config
from loraserve.cost import StepShape
from loraserve.engine.compute.protocol import DeviceLostError, Runner
from loraserve.engine.lending.leases import LeaseReader
from loraserve.engine.loading.announcements import ReadAnnouncer
from loraserve.engine.schedule.events import (
    AdapterDamaged,
    AdapterExpected,
    AdapterLoaded,
    CancelLoad,
    CopiesRetired,
    Emit,
    Event,
    EvictAdapter,
    Instruction,
    LeasesEnded,
    LoadAdapter,
    PlanPrepared,
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
from loraserve.engine.schedule.report import Rates, describe_capabilities, shape_of
from loraserve.engine.schedule.scheduler import Scheduler
from loraserve.engine.setup import build_runner, engine_number, scheduler_limits
from loraserve.engine.wiring import AdapterParts, wire_adapters
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
from loraserve.story import StoryEntry

T = TypeVar("T")
BuildRunner = Callable[[Config, Callable[[str], None]], Runner]


class EngineService(Service):
    """One engine. Ready once the model is loaded and its kernels are warm."""

    inbox = ToEngine

    def __init__(self, config: Config, bus: Bus, clock: Clock, build: BuildRunner | None = None) -> None:
        super().__init__(config, bus, clock)
        self._build = build or partial(build_runner, index=engine_number(bus.name))
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="step")
        self._waiter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="result")
        # Emptied by one loop: the scheduler must hear of steps in their order, whether they fail or not.
        self._steps: asyncio.Queue[tuple[StepBatch, StepShape, asyncio.Future[StepResult]]] = asyncio.Queue()
        self._rates = Rates()
        # Plans are answered each once; those of one epoch in the order in which they came.
        self._preparing: list[Envelope] = []
        self._idle = asyncio.Event()
        self._idle.set()
        self._leaks = 0
        self._checked = False
        self._runner: Runner
        self._scheduler: Scheduler
        self._adapters: AdapterParts

    async def start(self, stack: AsyncExitStack) -> None:
        for executor in (self._waiter, self._executor):
            stack.callback(executor.shutdown, wait=True, cancel_futures=True)
        self._runner = await self._in_worker(self._build, self.config, self._progress)
        self._scheduler = Scheduler(scheduler_limits(self.config, self._runner))
        announcer = ReadAnnouncer(self._runner, self._rates, self._tell)
        self._adapters = wire_adapters(self, self._runner, self._scheduler.residency, announcer, stack)

    def loops(self) -> list[Coroutine[Any, Any, None]]:
        return [self._report_load(), self._report_statistics(), self._await_steps()]

    async def drain(self) -> None:
        """Requests that run may finish; new ones are refused by then, because the state is DRAINING."""
        await self._idle.wait()

    def ready_detail(self) -> str:
        limits, resident = self._scheduler.limits, self._scheduler.load().adapters.resident
        return (
            f"{self._runner.weights_backend} weights, KV for {limits.kv_blocks * limits.block_tokens} tokens, "
            f"pool of {limits.pool_bytes >> 20} MiB, {len(resident)} adapters resident"
        )

    def story_entries(self, subject: str) -> list[StoryEntry]:
        return self._scheduler.story_entries(subject)

    async def handle(self, envelope: Envelope) -> None:
        match envelope.message:
            case Admit() as admit:
                self._admit(envelope, admit)
            case Abort(request_id=request_id):
                self._tell(RequestAborted(request_id))
            case ExpectAdapter(adapter=adapter):
                if self.state is ServiceState.READY:
                    self._tell(AdapterExpected(adapter))
            case PreparePlan(epoch=epoch, adapters=adapters):
                self._preparing.append(envelope)
                self._tell(PlanPrepared(epoch, adapters))
            case RetireCopies(epoch=epoch, keep=keep):
                before = self._pinned()
                self._tell(CopiesRetired(epoch, keep))
                self.bus.respond(envelope, RetireDone(epoch=epoch, unpinned=before - self._pinned()))
            case AnnounceCapabilities():
                self._announce_capabilities()
            case LeaseSlab() | RenewLease() | ReleaseLease():
                self._note_leases_ended(self._adapters.lender.answer(envelope, self.clock.monotonic_s()))
            case SlabDamaged() as complaint:
                if self._adapters.lender.accept_complaint(envelope.sender, complaint):
                    self.spawn(self._check_copies(complaint.version))
            case ReadRegion():
                answering = self._adapters.offers.answer_read(envelope)
                if answering is not None:
                    self.spawn(answering)
            case ConnectQueue():
                self.spawn(self._adapters.offers.connect(envelope))
            case EngineGone(engine=engine, incarnation=incarnation):
                reader = LeaseReader(engine, incarnation)
                self._note_leases_ended(self._adapters.lender.end_reader(reader, self.clock.monotonic_s()))
                self._adapters.offers.forget(engine, incarnation)
                self._adapters.sources.forget(engine, incarnation)

    def _admit(self, envelope: Envelope, admit: Admit) -> None:
        """Take the request or say at once why not, so that the router may ask another engine."""
        refusals: dict[str, Reject] = {}
        if self.state == ServiceState.DRAINING and admit.request_id not in self._scheduler.load().queue.request_ids:
            text = f"{self.bus.name} is draining"
            refusals[admit.request_id] = Reject(admit.request_id, admit.gateway, "draining", text)
        else:
            if admit.adapter is not None:
                self._adapters.cache.cache.uses.add(admit.adapter.version, self.clock.monotonic_s())
            self._tell(RequestArrived(admit), refusals)
        refusal = refusals.get(admit.request_id)
        answer = Admitted(request_id=admit.request_id, incarnation=self.bus.incarnation)
        if refusal is not None:
            answer = msgspec.structs.replace(answer, ok=False, code=refusal.code, message=refusal.message)
        self.bus.respond(envelope, answer)

    def _tell(self, event: Event, refusals: dict[str, Reject] | None = None) -> None:
        """One event to the scheduler, its instructions to the world. ``refusals`` keeps those of an arrival."""
        deltas: dict[str, list[TokenDelta]] = defaultdict(list)
        for instruction in self._scheduler.handle(event, self.clock.monotonic_s()):
            if isinstance(instruction, Emit):
                deltas[instruction.gateway].append(instruction.delta)
            elif isinstance(instruction, Reject) and refusals is not None:
                refusals[instruction.request_id] = instruction
            else:
                self._carry_out(instruction)
        self._checked = False
        (self._idle.set if self._scheduler.is_idle else self._idle.clear)()
        for gateway, batch in deltas.items():
            self.bus.send(
                gateway,
                TokenBatch(engine=self.bus.name, incarnation=self.bus.incarnation, deltas=tuple(batch)),
            )

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case RunStep(batch):
                # Begun at once: tokens of the last step are sent while this one computes.
                step = self._begin(batch)
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

    async def _load_adapter(self, load: LoadAdapter) -> None:
        result = await self._adapters.loader.load(load)
        if isinstance(result, AdapterLoaded) and result.slab is not None:
            self._rates.load_done(load.adapter.slab_bytes, result.slab.own_s)
        self._tell(result)

    async def _check_copies(self, version: str) -> None:
        """Check the copies of a slab that a peer found damaged."""
        if await self._adapters.lender.check_copies(version, self._adapters.reader):
            self._tell(AdapterDamaged(version))

    def _note_leases_ended(self, any_ended: bool) -> None:
        if any_ended:
            self._tell(LeasesEnded())

    def _begin(self, batch: StepBatch) -> asyncio.Future[StepResult]:
        if not self._runner.steps_ahead:
            return self._in_worker(lambda: self._runner.submit(batch).result())
        submitted = self._executor.submit(self._runner.submit, batch)
        return asyncio.get_running_loop().run_in_executor(self._waiter, lambda: submitted.result().result())

    def _shape_of(self, batch: StepBatch) -> StepShape:
        """Looked at while it computes, and while its slots are its adapters' for certain."""
        adapters = {entry.slot: entry.adapter for entry in self._scheduler.residency.pool.entries()}
        return shape_of(batch, adapters)[0]

    async def _await_steps(self) -> None:
        while True:
            await self._await_step(*await self._steps.get())

    async def _await_step(self, batch: StepBatch, shape: StepShape, step: asyncio.Future[StepResult]) -> None:
        try:
            result = await step
        except DeviceLostError as error:
            # The supervisor starts the process anew: to go on would be to fail every request.
            self.log.critical("device_lost", step=batch.step_id, reason=str(error))
            raise
        except Exception as error:
            self.log.exception("step_failed", step=batch.step_id, requests=[s.request_id for s in batch.sequences])
            self._tell(StepFailed(batch.step_id, f"{self.bus.name} could not compute a step: {error}"))
            return
        self._rates.step_done(shape, result.duration_s)
        self._tell(StepDone(result))

    def _answer_plan(self, epoch: int, failed: dict[str, str]) -> None:
        answer = Prepared(engine=self.bus.name, incarnation=self.bus.incarnation, epoch=epoch, failed=failed)
        asked = next(envelope for envelope in self._preparing if envelope.message.epoch == epoch)
        self._preparing.remove(asked)
        self.bus.respond(asked, answer)

    async def _report_load(self) -> None:
        self._announce_capabilities()
        while True:
            self._note_leases_ended(self._adapters.lender.expire(self.clock.monotonic_s()))
            load = self._scheduler.load()
            report = EngineLoad(
                engine=self.bus.name,
                incarnation=self.bus.incarnation,
                state=self.state,
                queue=load.queue,
                memory=load.memory,
                speed=self._rates.measured(),
                adapters=msgspec.structs.replace(load.adapters, cached=self._adapters.cache.cache.versions),
            )
            self.bus.send("monitor", report)
            await asyncio.sleep(self.config.engine.load_interval_s)

    async def _report_statistics(self) -> None:
        while True:
            self._check_idle()
            counters = self._scheduler.counters()
            statistics = EngineStatistics(
                engine=self.bus.name,
                incarnation=self.bus.incarnation,
                counters=msgspec.structs.replace(counters, leaks=self._leaks, reads=self._adapters.reader.counts()),
                adapter_tokens=self._scheduler.counts.by_adapter(),
            )
            self.bus.send("monitor", statistics)
            self._scheduler.counts.reported()
            await asyncio.sleep(self.config.engine.statistics_interval_s)

    def _announce_capabilities(self) -> None:
        capabilities = describe_capabilities(self._scheduler, self.bus.name, self.bus.incarnation)
        abilities, of_cache = self._adapters.offers.abilities, self._adapters.offers.cache_abilities
        self.bus.send("monitor", msgspec.structs.replace(capabilities, abilities=abilities, cache_abilities=of_cache))

    def _check_idle(self) -> None:
        """With no request left every block must be free and every invariant hold; anything else is a leak."""
        if self._checked or not self._scheduler.is_idle:
            return
        self._checked = True  # looking at every block takes a while: once each time that all is done
        try:
            self._scheduler.validate()
            self._adapters.lender.validate()
            self._adapters.cache.validate()
            assert self._scheduler.blocks.free == self._scheduler.limits.kv_blocks, "blocks are held by nobody"
        except AssertionError as error:
            self._leaks += 1
            self.log.error("leak", reason=str(error))

    def _pinned(self) -> int:
        return sum(adapter.pinned for adapter in self._scheduler.load().adapters.resident)

    def _progress(self, text: str) -> None:
        self.starting_detail = text
        self.log.info("starting_up", step=text)

    def _in_worker(self, function: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)
