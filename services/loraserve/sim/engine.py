"""A simulated engine: the real scheduler and pool; steps and loads take the time that the cost model says. Pure."""

from collections.abc import Callable
from heapq import heappop, heappush

import msgspec

from loraserve.cost import CostModel, StepShape
from loraserve.engine.schedule.events import (
    AdapterLoaded,
    CopiesRetired,
    Emit,
    Event,
    EvictAdapter,
    LoadAdapter,
    PlanPrepared,
    PlanReady,
    Reject,
    RequestArrived,
    RunStep,
    Sampled,
    SchedulerLimits,
    StepBatch,
    StepDone,
    StepResult,
)
from loraserve.engine.schedule.report import Rates, shape_of
from loraserve.engine.schedule.scheduler import Scheduler
from loraserve.messages import AdapterRef, Admit, EngineLoad

Happens = Callable[[float], None]
"""Called with the time at which it happens."""


class Timeline:
    """Things happen in order of their time, and in the order in which they were set where that is the same."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Happens]] = []
        self._set = 0
        self.now_s = 0.0

    def at(self, time_s: float, happens: Happens) -> None:
        self._set += 1
        heappush(self._due, (time_s, self._set, happens))

    def next(self) -> bool:
        """Let the next thing happen; False where there is none."""
        if not self._due:
            return False
        self.now_s, _, happens = heappop(self._due)
        happens(self.now_s)
        return True


TOKEN = 1
"""What every step draws for everybody; it stops nobody."""


class Watcher:
    """Who is told what comes out of an engine; the simulation overrides what it wants to know."""

    def first_token(self, request_id: str, now: float) -> None: ...

    def finished(self, request_id: str, now: float) -> None: ...

    def rejected(self, request_id: str, now: float) -> None: ...

    def prepared(self, engine: str, epoch: int, failed: dict[str, str], now: float) -> None: ...


class SimEngine:
    """``free_loads`` brings adapters in at once: for baselines that are given every adapter for nothing."""

    def __init__(
        self,
        name: str,
        limits: SchedulerLimits,
        cost: CostModel,
        timeline: Timeline,
        watcher: Watcher,
        free_loads: bool = False,
    ) -> None:
        self.name = name
        self.scheduler = Scheduler(limits)
        self._cost = cost
        self._timeline = timeline
        self._watcher = watcher
        self._free_loads = free_loads
        self._rates = Rates()
        self._slots: dict[int, AdapterRef] = {}
        self._batch: StepBatch | None = None
        self._began_s = 0.0
        self._step_s = 0.0
        self._growth_s = 0.0
        self._shape = StepShape()
        self._rank_mix: dict[int, int] = {}
        self._quiet = 0
        self._alarm = 0
        self._link_free_s = 0.0
        self.busy_s = 0.0
        self.rank_tokens: dict[int, int] = {}
        """Tokens computed since the last look, by the rank of their adapter."""

    def admit(self, admit: Admit, now: float) -> None:
        self._tell(RequestArrived(admit), now)

    def prepare(self, epoch: int, adapters: tuple[AdapterRef, ...], now: float) -> None:
        self._tell(PlanPrepared(epoch, adapters), now)

    def retire(self, epoch: int, keep: tuple[str, ...], now: float) -> None:
        self._tell(CopiesRetired(epoch, keep), now)

    def report(self, now: float) -> EngineLoad:
        """As the engine process sends it."""
        self._advance(now)
        load = self._load_message()
        self.scheduler.counts.reported()
        return load

    def _load_message(self) -> EngineLoad:
        return EngineLoad(
            engine=self.name,
            incarnation="simulated",
            state="READY",
            **msgspec.structs.asdict(self._rates.measured()),
            **msgspec.structs.asdict(self.scheduler.load()),
        )

    def held_bytes(self) -> tuple[int, int]:
        """Bytes of slabs in the pool: all, and those that the plan, a request or a load needs there."""
        entries = list(self.scheduler.residency.pool.entries())
        needed = sum(e.adapter.slab_bytes for e in entries if not e.evictable)
        return sum(e.adapter.slab_bytes for e in entries), needed

    def _tell(self, event: Event, now: float) -> None:
        self._advance(now)
        self._handle(event, now)
        self._set_alarm()

    def _handle(self, event: Event, now: float) -> None:
        for instruction in self.scheduler.handle(event, now):
            match instruction:
                case Emit(delta=delta):
                    if delta.index == 0:
                        self._watcher.first_token(delta.request_id, now)
                    if delta.finish is not None:
                        self._watcher.finished(delta.request_id, now)
                case RunStep(batch):
                    self._begin(batch, now)
                case LoadAdapter(adapter, slot):
                    self._slots[slot] = adapter
                    self._load(adapter, now)
                case EvictAdapter(slot=slot):
                    self._slots.pop(slot, None)
                case Reject(request_id):
                    self._watcher.rejected(request_id, now)
                case PlanReady(epoch, failed):
                    self._watcher.prepared(self.name, epoch, failed, now)

    def _load(self, adapter: AdapterRef, now: float) -> None:
        """One link: its bytes come after those of loads before it, and what is cancelled comes all the same.

        Steps go on as fast: a load writes its slab and reads it back for the digests, together about 20 GB/s of the
        2,039 GB/s that an A100's memory moves: 1 % of a step that does nothing but read.
        """
        if self._free_loads:
            self._timeline.at(now, self._loaded(adapter, 0.0))
            return
        began_s = max(now, self._link_free_s)
        self._link_free_s = began_s + adapter.slab_bytes * self._cost.load_byte_s
        load_s = self._cost.load_s(adapter.slab_bytes)
        self._timeline.at(began_s + load_s, self._loaded(adapter, load_s))

    def _loaded(self, adapter: AdapterRef, load_s: float) -> Callable[[float], None]:
        def happens(now: float) -> None:
            self._rates.load_done(adapter.slab_bytes, load_s)
            self._tell(AdapterLoaded(adapter.version), now)

        return happens

    def _begin(self, batch: StepBatch, now: float) -> None:
        self._batch, self._began_s = batch, now
        self._measure(batch)

    def _set_alarm(self) -> None:
        """For the end of the first step that changes anything."""
        self._alarm += 1
        if self._batch is None:
            return
        self._quiet = self.scheduler.quiet_steps()
        alarm = self._alarm
        end_s = self._began_s + self._steps_s(self._quiet + 1)
        self._timeline.at(end_s, lambda now: self._step_ends(now) if alarm == self._alarm else None)

    def _step_ends(self, now: float) -> None:
        assert self._batch is not None
        if self._quiet:
            self._skip(self._quiet)
        batch, self._batch = self._batch, None
        self._count(self._step_s, 1)
        sampled = tuple(Sampled(request_id=part.request_id, token=TOKEN) for part in batch.sequences if part.sample)
        self._handle(StepDone(StepResult(step_id=batch.step_id, sampled=sampled, duration_s=self._step_s)), now)
        self._set_alarm()

    def _advance(self, now: float) -> None:
        """Let the quiet steps that have ended by now have happened."""
        steps, quiet = 0, self._quiet if self._batch is not None else 0
        while steps < quiet and self._began_s + self._steps_s(steps + 1) <= now:
            steps += 1
        if steps:
            self._skip(steps)

    def _skip(self, steps: int) -> None:
        assert self._batch is not None
        took_s = self._steps_s(steps)
        self._began_s += took_s
        self._step_s += steps * self._growth_s
        self._quiet -= steps
        self._batch = self.scheduler.skip_steps(steps, TOKEN)
        self._grow((steps - 1) / 2)
        self._count(took_s / steps, steps)
        self._grow((steps + 1) / 2)

    def _steps_s(self, steps: int) -> float:
        """The outstanding step and those after it that only grow."""
        return steps * self._step_s + self._growth_s * (steps * (steps - 1) / 2)

    def _grow(self, steps: float) -> None:
        """Every sequence that decodes attends to one token more at each."""
        kv_tokens = self._shape.kv_tokens + steps * self._shape.decode_sequences
        self._shape = msgspec.structs.replace(self._shape, kv_tokens=kv_tokens)

    def _count(self, step_s: float, steps: int) -> None:
        self._rates.step_done(self._shape, step_s, steps)
        self.busy_s += step_s * steps
        for rank, tokens in self._rank_mix.items():
            self.rank_tokens[rank] = self.rank_tokens.get(rank, 0) + tokens * steps

    def _measure(self, batch: StepBatch) -> None:
        """What is in the step, and how long it takes. Of the quiet ones after it only the time differs."""
        self._shape, self._rank_mix = shape_of(batch, self._slots)
        self._step_s = self._cost.step_s(self._shape)
        self._growth_s = self._shape.decode_sequences * self._cost.kv_token_s
