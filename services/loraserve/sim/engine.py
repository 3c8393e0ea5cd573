"""A simulated engine: the production scheduler and adapter pool, with step and load times from the cost model.

In a *quiet* step all requests decode, and none starts or ends (``Scheduler.quiet_steps``). The engine sets one timer
for the end of the first step that may not be quiet. It fast-forwards the scheduler over the quiet steps before it.
"""

from collections.abc import Callable
from heapq import heappop, heappush

import msgspec

from loraserve.cost import CostModel, StepShape
from loraserve.engine.schedule.events import (
    AdapterLoaded,
    Emit,
    Event,
    EvictAdapter,
    LoadAdapter,
    PlanReady,
    Reject,
    RunStep,
    Sampled,
    SchedulerLimits,
    StepBatch,
    StepDone,
    StepResult,
)
from loraserve.engine.schedule.report import SpeedMeter, describe_capabilities, step_shape
from loraserve.engine.schedule.scheduler import Scheduler
from loraserve.messages import AdapterRef, EngineLoad, EngineStatistics

INCARNATION = "simulated"
TOKEN = 1
"""The token that every step samples for every request. It is not a stop token."""

Callback = Callable[[float], None]
"""A function that is called at its due time, with that time in seconds."""


class Timeline:
    """Simulated time and a queue of callbacks, ordered by due time, then by the order of scheduling."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._due: list[tuple[float, int, Callback]] = []
        self._scheduled = 0

    def schedule(self, time_s: float, callback: Callback) -> None:
        self._scheduled += 1
        heappush(self._due, (time_s, self._scheduled, callback))

    def run_next(self) -> bool:
        """Advance the time to the next callback and call it; return False if there is none."""
        if not self._due:
            return False
        self.now_s, _, callback = heappop(self._due)
        callback(self.now_s)
        return True


class EngineListener:
    """Receives the output of simulated engines. Subclasses override the methods that they need."""

    def on_first_token(self, request_id: str, now: float) -> None: ...

    def on_finished(self, request_id: str, now: float) -> None: ...

    def on_rejected(self, request_id: str, now: float) -> None: ...

    def on_prepared(self, engine: str, epoch: int, failed: dict[str, str], now: float) -> None:
        """Handle an engine's answer to ``CopiesRequested``; ``failed`` maps adapter versions to reasons."""


class SimEngine:
    """A simulated engine.

    Attributes:
        scheduler: The production scheduler.
        capabilities: The capabilities that an engine process would announce.
        busy_s: Total duration of the steps that have ended.
    """

    def __init__(
        self, name: str, limits: SchedulerLimits, cost: CostModel, timeline: Timeline, listener: EngineListener
    ) -> None:
        self.name = name
        self.scheduler = Scheduler(limits)
        self.capabilities = describe_capabilities(self.scheduler, name, INCARNATION)
        self.busy_s = 0.0
        self._rank_tokens: dict[int, int] = {}
        self._cost = cost
        self._timeline = timeline
        self._listener = listener
        self._speed = SpeedMeter()
        self._adapters_by_slot: dict[int, AdapterRef] = {}
        self._link_free_s = 0.0
        self._timer = 0
        """The number of the last timer. Earlier timers do nothing."""
        # The step in flight: batch, start time, duration, and growth of the duration with each later quiet step.
        self._batch: StepBatch | None = None
        self._step_start_s = 0.0
        self._step_s = 0.0
        self._growth_s = 0.0
        self._shape = StepShape()
        self._step_rank_tokens: dict[int, int] = {}
        self._quiet_steps = 0

    def deliver(self, event: Event, now: float) -> None:
        """Let the scheduler handle an event and carry out its instructions."""
        self._fast_forward(now)
        self._handle(event, now)
        self._set_timer()

    def report(self, now: float) -> tuple[EngineLoad, EngineStatistics]:
        """Return the load and the statistics that an engine process would send now."""
        self._fast_forward(now)
        scheduled = self.scheduler.load()
        load = EngineLoad(
            engine=self.name,
            incarnation=INCARNATION,
            state="READY",
            queue=scheduled.queue,
            memory=scheduled.memory,
            speed=self._speed.measured(),
            adapters=scheduled.adapters,
        )
        statistics = EngineStatistics(
            engine=self.name,
            incarnation=INCARNATION,
            counters=self.scheduler.counters(),
            adapter_tokens=self.scheduler.counts.by_adapter(),
        )
        self.scheduler.counts.mark_reported()
        return load, statistics

    def take_rank_tokens(self) -> dict[int, int]:
        """Return the number of tokens computed since the last call, by the rank of their adapter."""
        tokens, self._rank_tokens = self._rank_tokens, {}
        return tokens

    def _handle(self, event: Event, now: float) -> None:
        for instruction in self.scheduler.handle(event, now):
            match instruction:
                case Emit(delta=delta):
                    if delta.index == 0:
                        self._listener.on_first_token(delta.request_id, now)
                    if delta.finish is not None:
                        self._listener.on_finished(delta.request_id, now)
                case RunStep(batch):
                    self._start_step(batch, now)
                case LoadAdapter(adapter, slot):
                    self._adapters_by_slot[slot] = adapter
                    self._load(adapter, now)
                case EvictAdapter(slot=slot):
                    self._adapters_by_slot.pop(slot, None)
                case Reject(request_id):
                    self._listener.on_rejected(request_id, now)
                case PlanReady(epoch, failed):
                    self._listener.on_prepared(self.name, epoch, failed, now)

    # Loads

    def _load(self, adapter: AdapterRef, now: float) -> None:
        """Schedule the end of a load.

        Loads use one link in the order of their start, and a cancelled load still occupies the link. Loads do not slow
        steps down. In reality, writing a slab and reading it back for its digests takes about 33 GB/s of an A100's
        2,039 GB/s of memory bandwidth, which slows a step that only reads memory by less than 2%.
        """
        load_s = self._cost.load_s(adapter.slab_bytes)

        def end_load(now: float) -> None:
            self._speed.record_load(adapter.slab_bytes, load_s)
            self.deliver(AdapterLoaded(adapter.version), now)

        start_s = max(now, self._link_free_s)
        self._link_free_s = start_s + adapter.slab_bytes * self._cost.load_byte_s
        self._timeline.schedule(start_s + load_s, end_load)

    # Steps

    def _start_step(self, batch: StepBatch, now: float) -> None:
        self._batch, self._step_start_s = batch, now
        self._shape, self._step_rank_tokens = step_shape(batch, self._adapters_by_slot)
        self._step_s = self._cost.step_s(self._shape)
        self._growth_s = self._shape.decode_sequences * self._cost.kv_token_s

    def _set_timer(self) -> None:
        """Set the timer for the end of the first step in which a request may start, prefill or end."""
        self._timer += 1
        if self._batch is None:
            return
        self._quiet_steps = self.scheduler.quiet_steps()
        timer = self._timer
        end_s = self._step_start_s + self._steps_s(self._quiet_steps + 1)
        self._timeline.schedule(end_s, lambda now: self._end_step(now) if timer == self._timer else None)

    def _end_step(self, now: float) -> None:
        assert self._batch is not None
        if self._quiet_steps:
            self._skip(self._quiet_steps)
        batch, self._batch = self._batch, None
        self._count(self._step_s, 1)
        sampled = tuple(Sampled(request_id=part.request_id, token=TOKEN) for part in batch.sequences if part.sample)
        self._handle(StepDone(StepResult(step_id=batch.step_id, sampled=sampled, duration_s=self._step_s)), now)
        self._set_timer()

    def _fast_forward(self, now: float) -> None:
        """Skip the *quiet* steps (only decode; no request starts or ends) that end no later than ``now``."""
        steps, quiet = 0, self._quiet_steps if self._batch is not None else 0
        while steps < quiet and self._step_start_s + self._steps_s(steps + 1) <= now:
            steps += 1
        if steps:
            self._skip(steps)

    def _skip(self, steps: int) -> None:
        assert self._batch is not None
        duration_s = self._steps_s(steps)
        self._step_start_s += duration_s
        self._step_s += steps * self._growth_s
        self._quiet_steps -= steps
        self._batch = self.scheduler.skip_steps(steps, TOKEN)
        # Count all skipped steps with their mean shape.
        self._grow_context((steps - 1) / 2)
        self._count(duration_s / steps, steps)
        self._grow_context((steps + 1) / 2)

    def _steps_s(self, steps: int) -> float:
        """Return the seconds of ``steps`` steps: the step in flight and the decode steps after it."""
        return steps * self._step_s + self._growth_s * (steps * (steps - 1) / 2)

    def _grow_context(self, steps: float) -> None:
        """Add ``steps`` KV tokens for each decoding sequence to the shape of the step in flight."""
        kv_tokens = self._shape.kv_tokens + steps * self._shape.decode_sequences
        self._shape = msgspec.structs.replace(self._shape, kv_tokens=kv_tokens)

    def _count(self, step_s: float, steps: int) -> None:
        self._speed.record_step(self._shape, step_s, steps)
        self.busy_s += step_s * steps
        for rank, tokens in self._step_rank_tokens.items():
            self._rank_tokens[rank] = self._rank_tokens.get(rank, 0) + tokens * steps
