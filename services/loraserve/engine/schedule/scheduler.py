"""The scheduler: continuous batching with chunked prefill, preemption, and adapters loaded on demand.

The interface is `Scheduler.handle(event, now) -> instructions`. Each event may start adapter loads and steps. If the
runner accepts steps ahead, the next step is sent while the current one runs. That step may then contain PENDING_TOKEN
in place of a token not yet sampled. Requests waiting for an adapter are skipped, and later requests may start.

A simulator can use `quiet_steps` and `skip_steps` to advance many decode steps at once.
"""

from bisect import insort
from collections import Counter
from operator import attrgetter

from msgspec.structs import replace

from loraserve.engine.adapters.lifecycle import LifecycleEvent, LifecycleState
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
    CopiesRequested,
    CopiesRetired,
    Emit,
    Event,
    HandOver,
    Instruction,
    LeasesEnded,
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
from loraserve.engine.schedule.report import SchedulerLoad, TokenCounts, count_events, snapshot
from loraserve.engine.schedule.sequence import EARLY, ENDING, RUNNING, WAITING, Sequence, Transition
from loraserve.engine.schedule.steps import OvertakingLimit, StepBuilder, StepPipeline
from loraserve.messages import Admit, EngineCounters
from loraserve.story import Story

ARRIVAL_ORDER = attrgetter("order")


class Scheduler:
    """Schedules requests. Both queues, ``waiting`` and ``running``, are in order of arrival."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self.max_model_tokens = min(limits.max_model_tokens, limits.kv_blocks * limits.block_tokens)
        self.blocks = BlockManager(limits.kv_blocks, limits.block_tokens, limits.prefix_cache)
        self.counts = TokenCounts()
        self.story = Story()
        self.residency = Residency(limits, self.story)
        self.early = EarlyStarts(self.residency.pool)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        """Requests in state RUNNING, EARLY or ENDING."""
        self.pipeline = StepPipeline(1 + limits.steps_ahead)
        self.steps = 0
        self._sequences: dict[str, Sequence] = {}
        self._arrivals = 0

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Process one event and return the instructions to execute, in order."""
        match event:
            case RequestArrived(admit):
                instructions = self._arrive(admit, now)
            case RequestAborted(request_id):
                instructions = self._abort(request_id, now)
            case HandOver():
                text = "its engine stops; send it again"
                live = [sequence for sequence in self.waiting + self.running if sequence.state is not ENDING]
                instructions = [self._reject(sequence, "draining", text, now) for sequence in live]
            case StepDone(result):
                instructions = self._step_done(result, now)
            case StepFailed(step_id, message):
                instructions = self._step_failed(step_id, message, now)
            case AdapterArriving(version, read, least_tokens):
                self.early.announce_read(version, read, least_tokens)
                instructions = []
            case AdapterLoaded(version, read, slab):
                source = f" from {slab.source.name} over {slab.source.transport}" if slab else ""
                self.story.tell(version, now, f"loaded{source}")
                instructions = self.residency.complete_load(version, read, slab)
            case AdapterLoadFailed(version, code, message):
                instructions = self._load_failed(version, code, message, now)
            case AdapterDamaged(version):
                instructions = self._adapter_damaged(version, now)
            case CopiesRequested() | CopiesRetired() | LeasesEnded() | AdapterExpected():
                instructions = self.residency.handle(event, now)
        return instructions + self._start_work(now)

    def load(self) -> SchedulerLoad:
        return snapshot(self)

    def counters(self) -> EngineCounters:
        return count_events(self)

    @property
    def is_idle(self) -> bool:
        return not self._sequences and not self.pipeline

    def validate(self) -> None:
        """Raise AssertionError if an invariant is broken. The message names the invariant."""
        self.blocks.validate()
        self.residency.validate()
        self.pipeline.validate(self.running, self.blocks)
        self.early.validate(self.running)
        live = self.waiting + self.running
        assert {s.request_id for s in live} == self._sequences.keys(), "a request is in neither queue"
        assert len(live) == len(self._sequences), "a request is queued twice"
        for queue in (self.waiting, self.running):
            assert [s.order for s in queue] == sorted(s.order for s in queue), "a queue is out of order"
        for sequence in self.waiting:
            assert sequence.state is WAITING, f"a request in state {sequence.state.name} is queued as waiting"
            assert not sequence.blocks, "a waiting request holds blocks"
            assert not sequence.in_flight, "a waiting request is in a step"
        for sequence in self.running:
            is_running = sequence.state in (RUNNING, EARLY, ENDING)
            assert is_running, f"a request in state {sequence.state.name} is queued as running"
        assert self.blocks.references == sum(len(s.blocks) for s in self.running), "KV blocks are used by no request"
        users = Counter(sequence.version for sequence in self.running)
        for entry in self.residency.pool.entries():
            pins = users[entry.adapter.version]
            assert entry.running == pins, f"{entry.adapter.name} has {entry.running} pins, {pins} requests use it"

    # --- Requests arrive and end.

    def _arrive(self, admit: Admit, now: float) -> list[Instruction]:
        known = self._sequences.get(admit.request_id)
        if known is not None and known.state is ENDING:
            text = "a request with this id has ended, but a step in flight still contains it; try again"
            return [Reject(admit.request_id, admit.gateway, "overloaded", text)]
        if known is not None:
            return []
        error = self._request_error(admit)
        if error is not None:
            self.story.tell(admit.request_id, now, f"refused: {error[1]}")
            return [Reject(admit.request_id, admit.gateway, *error)]
        self._arrivals += 1
        sequence = Sequence(admit, self._arrivals, self.max_model_tokens, self.limits.block_tokens)
        self._sequences[admit.request_id] = sequence
        self.waiting.append(sequence)
        self.counts.count_request(sequence.version)
        if admit.adapter is not None:
            self.residency.note_request(admit.adapter, now)
        self.story.tell(admit.request_id, now, f"waiting, {sequence.prompt_length} prompt tokens")
        return []

    def _request_error(self, admit: Admit) -> tuple[str, str] | None:
        """Return (code, message with the remedy) if the engine cannot serve the request, else None."""
        length = len(admit.prompt_tokens)
        if length == 0:
            return "bad_request", "prompt_tokens is empty; send at least one token"
        if admit.sampling.max_tokens < 1:
            return "bad_request", f"max_tokens is {admit.sampling.max_tokens}; ask for at least 1"
        if not 0 <= admit.generated < min(length, admit.sampling.max_tokens):
            return "bad_request", (
                f"generated is {admit.generated}; it must be less than the {length} prompt_tokens and than max_tokens, "
                f"{admit.sampling.max_tokens}"
            )
        if length >= self.max_model_tokens:
            return "context_length", (
                f"This model's maximum context length is {self.max_model_tokens} tokens. However, your prompt has "
                f"{length} tokens; shorten it."
            )
        if len(self.waiting) >= self.limits.max_waiting:
            return "overloaded", f"{len(self.waiting)} requests are waiting already; try again later"
        unfit = self.residency.pool.refusal(admit.adapter) if admit.adapter else None
        return ("adapter_unavailable", unfit) if unfit else None

    def _abort(self, request_id: str, now: float) -> list[Instruction]:
        sequence = self._sequences.get(request_id)
        if sequence is not None and sequence.state is not ENDING:
            self.story.tell(request_id, now, "aborted")
            self._end(sequence, now)
        return []

    def _reject(self, sequence: Sequence, code: str, message: str, now: float) -> Reject:
        self.story.tell(sequence.request_id, now, f"failed: {code}")
        self._end(sequence, now)
        return Reject(sequence.request_id, sequence.admit.gateway, code, message)

    def _end(self, sequence: Sequence, now: float) -> None:
        """End the request. It keeps its blocks, in state ENDING, until no step in flight writes to them."""
        if not sequence.in_flight:
            self._release(sequence, now)
        elif sequence.state is not ENDING:
            sequence.advance(Transition.END)

    def _release(self, sequence: Sequence, now: float) -> None:
        if sequence.state is WAITING:
            self.waiting.remove(sequence)
        else:
            self._stop_running(sequence, now)
        sequence.advance(Transition.RELEASE)
        del self._sequences[sequence.request_id]

    def _stop_running(self, sequence: Sequence, now: float) -> None:
        """Remove the request from the running queue, and release its blocks and its pin on the adapter."""
        self.running.remove(sequence)
        self.blocks.release(sequence.blocks)
        sequence.blocks = ()
        if sequence.version:
            self.residency.pool.stop_running(sequence.version, now)

    # --- Steps return.

    def _step_done(self, result: StepResult, now: float) -> list[Instruction]:
        sampled = {token.request_id: token for token in result.sampled}
        instructions: list[Instruction] = []
        for part in self.pipeline.pop(result.step_id).sequences:
            sequence = self._sequences[part.request_id]
            sequence.part_returned(part)
            in_time = self.early.is_valid(sequence, late=part.request_id in result.late)
            if in_time and sequence.is_kv_valid(part):
                self._record_kv(sequence, len(part.tokens))
            if sequence.state is ENDING:
                self._end(sequence, now)
                continue
            if not in_time:
                sequence.reset(0)
                self._set_back(sequence, now, "set back: its adapter did not arrive in time")
                continue
            if sequence.state is EARLY:
                sequence.advance(Transition.CONFIRM)
            if part.sample:
                delta = sequence.accept(sampled[part.request_id], self.limits.eos_token_ids)
                instructions.append(Emit(sequence.admit.gateway, delta))
                if delta.finish is not None:
                    self.story.tell(part.request_id, now, f"finished: {delta.finish}")
                    self._end(sequence, now)
        return instructions

    def _record_kv(self, sequence: Sequence, tokens: int) -> None:
        """Record that the KV of ``tokens`` more tokens is computed, and add completed blocks to the prefix cache."""
        self.counts.count_tokens(sequence.version, tokens, decode=sequence.is_decoding)
        block_tokens = self.limits.block_tokens
        first = sequence.computed // block_tokens
        sequence.computed += tokens
        if self.limits.prefix_cache and self.residency.is_ready(sequence.version):
            for index in range(first, sequence.computed // block_tokens):
                self.blocks.add_to_cache(sequence.blocks[index], sequence.block_digest(index))

    def _step_failed(self, step_id: int, message: str, now: float) -> list[Instruction]:
        instructions: list[Instruction] = []
        for part in self.pipeline.pop(step_id).sequences:
            sequence = self._sequences[part.request_id]
            sequence.part_returned(part)
            if sequence.state is ENDING:
                self._end(sequence, now)
            else:
                instructions.append(self._reject(sequence, "engine_error", message, now))
        return instructions

    # --- Adapters fail.

    def _load_failed(self, version: str, code: str, message: str, now: float) -> list[Instruction]:
        """Reject all requests that need the adapter. If its load was cancelled, only free its extent."""
        self.story.tell(version, now, f"load failed: {code}: {message}")
        if code == CANCELLED:
            return self.residency.drop_cancelled_load(version)
        instructions = self.residency.fail_load(version, message)
        early = [s for s in self.running if s.version == version and s.state is EARLY]
        waiting = [s for s in self.waiting if s.version == version]
        for sequence in early + waiting:
            assert sequence.admit.adapter is not None
            text = f"adapter {sequence.admit.adapter.name} could not be loaded: {message}"
            instructions.append(self._reject(sequence, "adapter_unavailable", text, now))
        return instructions

    def _adapter_damaged(self, version: str, now: float) -> list[Instruction]:
        """Reject the requests computed with the damaged slab. Requests that have not started wait for a reload.

        The whole prefix cache is cleared, because a digest does not tell which adapter its block belongs to.
        """
        if self.residency.pool.state(version) is not LifecycleState.RESIDENT:
            return []
        self.residency.pool.apply(version, LifecycleEvent.DAMAGE_FOUND)
        self.story.tell(version, now, "damaged in the pool: it leaves once no request runs with it")
        self.blocks.clear_cache()
        affected = [s for s in self.waiting + self.running if s.version == version and s.has_started]
        text = "its adapter was damaged in this engine's memory; send it again"
        return [self._reject(s, "adapter_damaged", text, now) for s in affected]

    # --- Loads and steps start.

    def _start_work(self, now: float) -> list[Instruction]:
        wanted = (s.admit.adapter for s in self.waiting if s.admit.adapter is not None)
        instructions = self.residency.start_loads(wanted, now, not self._sequences, stepping=bool(self.running))
        while not self.pipeline.is_full and (self.running or self.waiting):
            batch = self._form_step(now)
            if batch is None:
                break
            self.pipeline.push(batch)
            instructions.append(RunStep(batch))
        return instructions

    def _form_step(self, now: float) -> StepBatch | None:
        builder = StepBuilder(self.blocks, self.limits.max_step_tokens, self.pipeline.newest_requests)
        builder.add_running(self.running)
        for sequence in builder.preempted:
            self.counts.preemptions += 1
            self._set_back(sequence, now, "preempted")
        if not builder.preempted and not builder.waits_for_blocks:
            self._start_waiting(builder, now)
        parts = builder.parts()
        if not parts:
            return None
        self.steps += 1
        return StepBatch(step_id=self.steps, sequences=parts)

    def _set_back(self, sequence: Sequence, now: float, reason: str) -> None:
        self.story.tell(sequence.request_id, now, reason)
        self._stop_running(sequence, now)
        sequence.advance(Transition.SET_BACK)
        insort(self.waiting, sequence, key=ARRIVAL_ORDER)

    def _start_waiting(self, builder: StepBuilder, now: float) -> None:
        """Start waiting requests in order of arrival.

        Requests waiting for an adapter are skipped. A request waiting for KV memory delays all later ones.
        """
        if not self.waiting:
            return
        overtaking = OvertakingLimit(self.residency.find_blockers)
        places = self.limits.max_running - sum(s.state is not ENDING for s in self.running)
        for sequence in list(self.waiting):
            if places == 0 or builder.budget == 0:
                return
            is_resident = self.residency.is_ready(sequence.version)
            if not is_resident and not self.early.can_start(sequence, builder.first_tokens):
                overtaking.skip(sequence)
                continue
            if not overtaking.may_start(sequence):
                continue
            if not builder.allocate_waiting(sequence):
                return
            self._start(sequence, now)
            places -= 1
            builder.add_started(sequence)
            overtaking.record_start(sequence)

    def _start(self, sequence: Sequence, now: float) -> None:
        self.waiting.remove(sequence)
        if sequence.version:
            sequence.slot = self.residency.pool.start_running(sequence.version, now)
            sequence.early_read = self.early.start(sequence.version)
        sequence.advance(Transition.START_EARLY if sequence.early_read else Transition.START)
        insort(self.running, sequence, key=ARRIVAL_ORDER)
        self.counts.count_prefix(len(sequence.history), sequence.computed)
        self.story.tell(sequence.request_id, now, f"running, {sequence.computed} tokens cached")

    # --- Many decode steps at once, for a simulator.

    def quiet_steps(self) -> int:
        """Return a lower bound on the number of quiet steps that follow, including the step in flight.

        In a quiet step all running requests decode, and none starts or ends. The count assumes that no sampled token
        stops a request. Returns 0 if the next step may not be quiet or the prefix cache is enabled. Also returns 0
        unless exactly one step is in flight.
        """
        batch = self.pipeline.only_step
        if batch is None or self.limits.prefix_cache or len(batch.sequences) != len(self.running):
            return 0
        # The latest arrival is checked first, because it is the most likely to be in prefill.
        decoding = all(s.is_decoding and s.pending and s.state is RUNNING for s in reversed(self.running))
        if self._may_start_next() or not decoding:
            return 0
        steps = min(s.max_tokens - s.output_length - 1 for s in self.running)
        while steps > 0 and sum(self._missing_blocks(s, steps) for s in self.running) > self.blocks.free:
            steps //= 2
        return max(0, steps)

    def skip_steps(self, steps: int, token: int) -> StepBatch:
        """Advance by ``steps`` quiet steps that sample ``token`` for every request. Returns the new step in flight.

        ``steps`` is between 1 and `quiet_steps()`. The resulting state equals the state after a StepDone event for each
        step. No Emit instructions are produced.
        """
        current = self.pipeline.only_step
        assert current is not None, "quiet steps need exactly one step in flight"
        self.pipeline.pop(current.step_id)
        self._allocate_for_quiet_steps(steps)
        parts = []
        for sequence, part in zip(self.running, current.sequences, strict=True):
            sequence.history.extend([token] * steps)
            sequence.computed += steps
            sequence.scheduled += steps
            self.counts.count_tokens(sequence.version, steps, decode=True)
            start, output_index = part.start + steps, part.output_index + steps
            parts.append(replace(part, tokens=(token,), start=start, blocks=sequence.blocks, output_index=output_index))
        batch = StepBatch(step_id=current.step_id + steps, sequences=tuple(parts))
        self.pipeline.push(batch)
        self.steps += steps
        return batch

    def _may_start_next(self) -> bool:
        if len(self.running) >= min(self.limits.max_running, self.limits.max_step_tokens):
            return False
        free = self.blocks.free
        return any(
            self.residency.is_ready(s.version) and self.blocks.blocks_for(len(s.history) + 1) <= free
            for s in self.waiting
        )

    def _missing_blocks(self, sequence: Sequence, steps: int) -> int:
        return self.blocks.blocks_for(sequence.computed + steps + 1) - len(sequence.blocks)

    def _allocate_for_quiet_steps(self, steps: int) -> None:
        """Allocate the blocks for ``steps`` decode steps in the order in which single steps would allocate them."""
        due: list[tuple[int, int]] = []
        for index, sequence in enumerate(self.running):
            held = len(sequence.blocks)
            more = range(held, held + self._missing_blocks(sequence, steps))
            due += [(block * self.limits.block_tokens - sequence.computed, index) for block in more]
        for _, index in sorted(due):
            allocated = self.blocks.allocate(1)
            assert allocated is not None, "there are fewer free blocks than were counted"
            self.running[index].blocks += allocated
