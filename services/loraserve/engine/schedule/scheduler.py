"""The engine's decisions: continuous batching with chunked prefill, preemption, and adapters brought in on the way.

Pure: events in, instructions out, the time is an argument. Where the runner takes steps ahead, the next ones are sent
while one still runs, with tokens in them that nobody knows yet. A request whose adapter is on its way never holds up
the others.
"""

from bisect import insort
from collections.abc import Set
from operator import attrgetter

from loraserve.engine.adapters.pool import AdapterPool
from loraserve.engine.adapters.residency import Residency
from loraserve.engine.schedule.blocks import BlockManager
from loraserve.engine.schedule.early import EarlyStarts
from loraserve.engine.schedule.events import (
    CANCELLED,
    AdapterArriving,
    AdapterDamaged,
    AdapterExpected,
    AdapterLoaded,
    AdapterLoadFailed,
    CopiesRetired,
    Emit,
    Event,
    Instruction,
    LeasesEnded,
    PlanPrepared,
    Reject,
    RequestAborted,
    RequestArrived,
    RunStep,
    SchedulerLimits,
    StepBatch,
    StepDone,
    StepFailed,
    StepResult,
)
from loraserve.engine.schedule.overtaking import Bypass
from loraserve.engine.schedule.report import SchedulerLoad, TokenCounts, snapshot
from loraserve.engine.schedule.sequence import LEAVING, RUNNING, Sequence, State
from loraserve.engine.schedule.steps import Outstanding, StepBuilder
from loraserve.messages import Admit
from loraserve.story import Story

ORDER = attrgetter("order")


class Scheduler:
    """State: sequences waiting (in order of arrival) and running (likewise), KV blocks, the pool, steps."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self.max_model_tokens = min(limits.max_model_tokens, limits.kv_blocks * limits.block_tokens)
        self.blocks = BlockManager(limits.kv_blocks, limits.block_tokens, limits.prefix_cache)
        self.counts = TokenCounts()
        self._story = Story()
        self.residency = Residency(limits, self._story)
        self.early = EarlyStarts(self.residency.pool)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._sequences: dict[str, Sequence] = {}
        self._arrivals = self.steps = 0
        self.outstanding = Outstanding(1 + limits.steps_ahead)

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """What to do about one event."""
        match event:
            case RequestArrived(admit):
                instructions = self._arrive(admit, now)
            case RequestAborted(request_id):
                instructions = self._abort(request_id, now)
            case StepDone(result):
                instructions = self._step_done(result, now)
            case StepFailed(step_id, message):
                instructions = self._step_failed(step_id, message, now)
            case AdapterArriving(version, read, least_tokens):
                self.early.arriving(version, read, least_tokens)
                instructions = []
            case AdapterLoaded(version, read):
                self._story.tell(version, now, "loaded")
                self.early.over(version, read)
                instructions = self.residency.loaded(version)
            case AdapterLoadFailed(version, code, message):
                instructions = self._load_failed(version, code, message, now)
            case AdapterDamaged(version):
                instructions = self._damaged(version, now)
            case PlanPrepared() | CopiesRetired() | LeasesEnded() | AdapterExpected():
                instructions = self.residency.handle(event, now)
        return instructions + self._go_on(now)

    def load(self) -> SchedulerLoad:
        """The state that others decide with."""
        return snapshot(self)

    def story(self, subject: str) -> list[str]:
        """What happened to a request (by id) or an adapter (by version)."""
        return self._story.of(subject)

    @property
    def idle(self) -> bool:
        """Nothing to do and nothing outstanding."""
        return not self._sequences and not self.outstanding

    def validate(self) -> None:
        """Every invariant of the state; raises AssertionError naming the one that broke."""
        self.blocks.validate()
        self.residency.validate()
        check_queues(self.waiting, self.running, self._sequences.keys(), self.blocks, self.residency.pool)
        self.outstanding.validate(self.running)
        self.early.validate(self.running)

    def _arrive(self, admit: Admit, now: float) -> list[Instruction]:
        known = self._sequences.get(admit.request_id)
        if known is not None and known.state is State.LEAVING:
            text = "a request of this id has ended and is in a step still; try again"
            return [Reject(admit.request_id, admit.gateway, "overloaded", text)]
        if known is not None:
            return []
        refusal = refusal_of(admit, self.limits, self.max_model_tokens, len(self.waiting), self.residency.pool)
        if refusal is not None:
            self._story.tell(admit.request_id, now, f"refused: {refusal[1]}")
            return [Reject(admit.request_id, admit.gateway, *refusal)]
        self._arrivals += 1
        sequence = Sequence(admit, self._arrivals, self.max_model_tokens, self.limits.block_tokens)
        self._sequences[admit.request_id] = sequence
        self.waiting.append(sequence)
        self.counts.request(sequence.version)
        if admit.adapter is not None:
            self.residency.arrived(admit.adapter, now)
        self._story.tell(admit.request_id, now, f"waiting, {sequence.prompt_length} prompt tokens")
        return []

    def _abort(self, request_id: str, now: float) -> list[Instruction]:
        sequence = self._sequences.get(request_id)
        if sequence is not None and sequence.state is not State.LEAVING:
            self._story.tell(request_id, now, "aborted")
            self._end(sequence, now)
        return []

    def _step_done(self, result: StepResult, now: float) -> list[Instruction]:
        drawn = {sampled.request_id: sampled for sampled in result.sampled}
        instructions: list[Instruction] = []
        for part in self.outstanding.take(result.step_id).sequences:
            sequence = self._sequences[part.request_id]
            sequence.landed(part)
            came = self.early.came(sequence, part.request_id in result.late)
            if came and sequence.trusts(part):
                self._computed(sequence, len(part.tokens))
            if not came and sequence.state is RUNNING:
                sequence.begin(0)
                self._set_back(sequence, now, "set back: its adapter was not there in time")
            elif sequence.state is LEAVING:
                self._end(sequence, now)
            elif part.sample:
                delta = sequence.accept(drawn[part.request_id], self.limits.eos_token_ids)
                instructions.append(Emit(sequence.admit.gateway, delta))
                if delta.finish is not None:
                    self._story.tell(part.request_id, now, f"finished: {delta.finish}")
                    self._end(sequence, now)
        return instructions

    def _computed(self, sequence: Sequence, tokens: int) -> None:
        """The KV of these tokens exists: full blocks become shareable."""
        self.counts.computed(sequence.version, tokens, decode=sequence.decoding)
        block_tokens = self.limits.block_tokens
        first = sequence.computed // block_tokens
        sequence.computed += tokens
        if self.limits.prefix_cache and self.residency.ready(sequence.version):
            for index in range(first, sequence.computed // block_tokens):
                self.blocks.publish(sequence.blocks[index], sequence.digest(index))

    def _step_failed(self, step_id: int, message: str, now: float) -> list[Instruction]:
        instructions: list[Instruction] = []
        for part in self.outstanding.take(step_id).sequences:
            sequence = self._sequences[part.request_id]
            sequence.landed(part)
            if sequence.state is LEAVING:
                self._end(sequence, now)
            else:
                instructions.append(self._reject(sequence, "engine_error", message, now))
        return instructions

    def _load_failed(self, version: str, code: str, message: str, now: float) -> list[Instruction]:
        self._story.tell(version, now, f"load failed: {code}: {message}")
        self.early.over(version)
        if code == CANCELLED:
            return self.residency.load_cancelled(version)
        instructions = self.residency.load_failed(version, message)
        waiting = [s for s in self.waiting if s.version == version]
        for sequence in self.early.begun_with(version, self.running) + waiting:
            assert sequence.admit.adapter is not None
            text = f"adapter {sequence.admit.adapter.name} could not be loaded: {message}"
            instructions.append(self._reject(sequence, "adapter_unavailable", text, now))
        return instructions

    def _damaged(self, version: str, now: float) -> list[Instruction]:
        """Who has been computed with it ends; who has not waits for it to be loaded anew. The prefix cache may hold
        what came of it, under names that nobody can tell: all of it goes."""
        if not self.residency.pool.damage(version):
            return []
        self._story.tell(version, now, "damaged in the pool: it goes with the last that uses it")
        self.blocks.forget()
        begun = [s for s in self.waiting + self.running if s.version == version and s.begun]
        text = "its adapter was damaged in this engine's memory; send it again"
        return [self._reject(s, "engine_error", text, now) for s in begun]

    def _reject(self, sequence: Sequence, code: str, message: str, now: float) -> Reject:
        self._story.tell(sequence.request_id, now, f"failed: {code}")
        self._end(sequence, now)
        return Reject(sequence.request_id, sequence.admit.gateway, code, message)

    def _end(self, sequence: Sequence, now: float) -> None:
        """Nothing more is said about it. Steps in flight still write to its blocks: they stay until those are back."""
        if sequence.in_flight:
            sequence.state = State.LEAVING
        else:
            self._release(sequence, now)

    def _release(self, sequence: Sequence, now: float) -> None:
        """Blocks, pin and place in the queues go back."""
        if sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        else:
            self._stop(sequence, now)
        sequence.state = State.FINISHED
        del self._sequences[sequence.request_id]

    def _stop(self, sequence: Sequence, now: float) -> None:
        self.running.remove(sequence)
        self.blocks.give_back(sequence.blocks)
        sequence.blocks = ()
        if sequence.version:
            self.residency.pool.stop_running(sequence.version, now)

    def _go_on(self, now: float) -> list[Instruction]:
        """Start the loads and the steps that have become possible."""
        wanted = (s.admit.adapter for s in self.waiting if s.admit.adapter is not None)
        instructions = self.residency.start_loads(wanted, now, not self._sequences, stepping=bool(self.running))
        while not self.outstanding.full and (self.running or self.waiting):
            batch = self._form_step(now)
            if batch is None:
                break
            self.outstanding.send(batch)
            instructions.append(RunStep(batch))
        return instructions

    def _form_step(self, now: float) -> StepBatch | None:
        builder = StepBuilder(self.blocks, self.limits.max_step_tokens, self.outstanding.newest)
        builder.continue_running(self.running)
        for sequence in builder.preempted:
            self._preempt(sequence, now)
        if not builder.preempted and not builder.short:
            self._admit_waiting(builder, now)
        parts = builder.parts()
        if not parts:
            return None
        self.steps += 1
        return StepBatch(step_id=self.steps, sequences=parts)

    def _preempt(self, sequence: Sequence, now: float) -> None:
        self.counts.preemptions += 1
        self._set_back(sequence, now, "preempted")

    def _set_back(self, sequence: Sequence, now: float, why: str) -> None:
        self._story.tell(sequence.request_id, now, why)
        self._stop(sequence, now)
        sequence.state = State.WAITING
        insort(self.waiting, sequence, key=ORDER)

    def _admit_waiting(self, builder: StepBuilder, now: float) -> None:
        """In order of arrival. Who waits for an adapter is passed by; who waits for memory is not."""
        if not self.waiting:
            return
        bypass = Bypass(self.residency.in_the_way)
        places = self.limits.max_running - sum(s.state is RUNNING for s in self.running)
        for sequence in list(self.waiting):
            if places == 0 or builder.budget == 0:
                return
            if not (self.residency.ready(sequence.version) or self.early.may_begin(sequence, builder.first_tokens)):
                bypass.passes(sequence)
                continue
            if bypass.holds_up(sequence):
                continue
            if not builder.admit(sequence):
                return
            self._start(sequence, now)
            places -= 1
            builder.begin(sequence)
            bypass.began(sequence)

    def _start(self, sequence: Sequence, now: float) -> None:
        self.waiting.remove(sequence)
        sequence.state = State.RUNNING
        if sequence.version:
            sequence.slot = self.residency.pool.start_running(sequence.version, now)
            self.early.begin(sequence)
        insort(self.running, sequence, key=ORDER)
        self.counts.prefix(len(sequence.history), sequence.computed)
        self._story.tell(sequence.request_id, now, f"running, {sequence.computed} tokens cached")


# MERGED: loraserve.engine.schedule.scheduler
# """Which requests an engine cannot serve at all, in words. Pure."""


def refusal_of(
    admit: Admit, limits: SchedulerLimits, max_model_tokens: int, waiting: int, pool: AdapterPool
) -> tuple[str, str] | None:
    """(code, message with the remedy) where this request cannot be served here; ``waiting`` do already."""
    length = len(admit.prompt_tokens)
    if length == 0:
        return "bad_request", "prompt_tokens is empty; send at least one token"
    if admit.sampling.max_tokens < 1:
        return "bad_request", f"max_tokens is {admit.sampling.max_tokens}; ask for at least 1"
    if length >= max_model_tokens:
        return "context_length", (
            f"This model's maximum context length is {max_model_tokens} tokens. However, your prompt has "
            f"{length} tokens; shorten it."
        )
    if waiting >= limits.max_waiting:
        return "overloaded", f"{waiting} requests wait already; try again later"
    unfit = pool.refusal(admit.adapter) if admit.adapter else None
    return ("adapter_unavailable", unfit) if unfit else None


# MERGED: loraserve.engine.schedule.scheduler
# """What must hold of the scheduler's requests after every event. Pure."""


def check_queues(
    waiting: list[Sequence], running: list[Sequence], known: Set[str], blocks: BlockManager, pool: AdapterPool
) -> None:
    """Both are in order and hold all that are known, and blocks and pins are held by those who run and nobody else."""
    live = waiting + running
    assert {s.request_id for s in live} == known, "a request is in no list or in two"
    assert len(live) == len(known), "a request is listed twice"
    for queue in (waiting, running):
        assert [s.order for s in queue] == sorted(s.order for s in queue), "a queue is out of order"
    assert all(s.state is State.WAITING and not s.blocks for s in waiting), "a waiting request holds blocks"
    assert not any(s.in_flight for s in waiting), "a waiting request is in a step"
    assert all(s.state in (State.RUNNING, State.LEAVING) for s in running), "a running request is in another state"
    assert blocks.held == sum(len(s.blocks) for s in running), "blocks are held by nobody"
    users: dict[str, int] = {}
    for sequence in running:
        users[sequence.version] = users.get(sequence.version, 0) + 1
    for entry in pool.entries():
        assert entry.running == users.get(entry.adapter.version, 0), f"{entry.adapter.name} has a stray pin"
