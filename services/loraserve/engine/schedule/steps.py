"""Forms the next step, and keeps the steps in flight.

A step first decodes, then prefills in chunks (continuous batching with chunked prefill). When KV blocks run out, the
request that arrived last is preempted: it gives up its blocks and waits to be computed again.
"""

from collections import deque
from collections.abc import Collection

from loraserve.engine.schedule.blocks import BlockManager
from loraserve.engine.schedule.events import SequenceStep, StepBatch
from loraserve.engine.schedule.sequence import ENDING, RUNNING, Sequence


class StepBuilder:
    """Gives tokens and KV blocks to sequences until the step's token budget or the blocks are used up.

    ``previous`` are the requests in the step that was sent last. ``waits_for_blocks`` is set when a running sequence
    needs blocks that steps in flight will free; no request may start in such a step.
    """

    def __init__(self, blocks: BlockManager, budget_tokens: int, previous: Collection[str]) -> None:
        self._blocks = blocks
        self._previous = previous
        self._parts: dict[str, SequenceStep] = {}
        self.budget = budget_tokens
        self.preempted: list[Sequence] = []
        self.waits_for_blocks = False

    def add_running(self, running: list[Sequence]) -> None:
        """Add the running sequences in order of arrival, those that decode before those that prefill.

        When blocks run out, the latest arrivals are preempted, so that the oldest request always makes progress. A
        sequence in a step in flight cannot be preempted, as the step uses its blocks. A sequence in flight that lacks
        blocks itself sits this step out. If all possible victims are in flight, no later sequence is added either, so
        that they can be preempted once their steps are done.
        """
        decoding: list[Sequence] = []
        prefilling: list[Sequence] = []
        for sequence in running:
            if sequence.state is RUNNING and (not sequence.in_flight or self._can_follow(sequence)):
                (decoding if sequence.will_decode else prefilling).append(sequence)
        for sequence in decoding + prefilling:
            if self.budget == 0:
                return
            if sequence in self.preempted:
                continue
            tokens = min(sequence.unscheduled, self.budget)
            while not self._allocate(sequence, tokens):
                if sequence.in_flight:
                    self.waits_for_blocks = True
                    break
                victim = self._choose_victim(running, sequence)
                if victim is None:
                    self.waits_for_blocks = True
                    return
                self._preempt(victim)
                if victim is sequence:
                    break
            else:
                self._add_part(sequence, tokens)

    def allocate_waiting(self, sequence: Sequence) -> bool:
        """Allocate blocks for all known tokens of a waiting sequence; False if they do not fit beside what runs."""
        cached = self._acquire_cached_prefix(sequence)
        needed = self._blocks.blocks_for(len(sequence.history) + 1) - len(cached)
        if needed > self._blocks.free:
            self._blocks.release(cached)
            return False
        sequence.blocks = tuple(cached)
        sequence.reset(len(cached) * self._blocks.block_tokens)
        if sequence.output_length == 0:
            sequence.cached_tokens = sequence.computed
        allocated = self._allocate(sequence, min(sequence.unscheduled, self.budget))
        assert allocated, "there are fewer free blocks than were counted"
        return True

    def add_started(self, sequence: Sequence) -> None:
        """Add a sequence that has been started after ``allocate_waiting``."""
        self._add_part(sequence, min(sequence.unscheduled, self.budget))

    def first_tokens(self, sequence: Sequence) -> int:
        """Return how many tokens of a waiting sequence this step would compute."""
        cached = self._count_cached_prefix(sequence) * self._blocks.block_tokens
        return min(len(sequence.history) - cached, self.budget)

    def parts(self) -> tuple[SequenceStep, ...]:
        return tuple(self._parts.values())

    def _can_follow(self, sequence: Sequence) -> bool:
        """Return whether a sequence in flight can be in this step: only the step just before may sample its token."""
        return sequence.request_id in self._previous and sequence.can_run_ahead

    def _add_part(self, sequence: Sequence, tokens: int) -> None:
        part = sequence.next_part(tokens)
        sequence.part_sent(part)
        self._parts[sequence.request_id] = part
        self.budget -= tokens

    def _allocate(self, sequence: Sequence, tokens: int) -> bool:
        """Give the sequence the blocks for its next ``tokens`` tokens: all of them or none."""
        missing = self._blocks.blocks_for(sequence.scheduled + tokens) - len(sequence.blocks)
        if missing <= 0:
            return True
        allocated = self._blocks.allocate(missing)
        if allocated is None:
            return False
        sequence.blocks += allocated
        return True

    def _choose_victim(self, running: list[Sequence], sequence: Sequence) -> Sequence | None:
        """Return the latest arrival that is in no step, which may be the sequence itself.

        None if another sequence that is in flight will release blocks or can be preempted soon.
        """
        later = [s for s in running if s not in self.preempted and s.order > sequence.order]
        idle = [s for s in later if not s.in_flight]
        if idle:
            return idle[-1]
        in_flight = [s for s in running if s.state is ENDING] + later
        return None if any(s.request_id not in self._parts for s in in_flight) else sequence

    def _preempt(self, sequence: Sequence) -> None:
        self._blocks.release(sequence.blocks)
        sequence.blocks = ()
        sequence.reset(0)
        self.preempted.append(sequence)

    def _count_cached_prefix(self, sequence: Sequence) -> int:
        most = self._shareable_blocks(sequence)
        return next((i for i in range(most) if not self._blocks.has_cached(sequence.block_digest(i))), most)

    def _acquire_cached_prefix(self, sequence: Sequence) -> list[int]:
        """Return references to the sequence's leading full blocks that are in the prefix cache."""
        found = []
        for index in range(self._shareable_blocks(sequence)):
            block = self._blocks.acquire_cached(sequence.block_digest(index))
            if block is None:
                break
            found.append(block)
        return found

    def _shareable_blocks(self, sequence: Sequence) -> int:
        """Return the number of full blocks before the last known token, which is always computed to get its output."""
        return (len(sequence.history) - 1) // self._blocks.block_tokens


class StepPipeline:
    """The steps in flight, oldest first: sent to the runner and not returned. They return in the order of sending."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._steps: deque[StepBatch] = deque()

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def is_full(self) -> bool:
        return len(self._steps) >= self._capacity

    @property
    def only_step(self) -> StepBatch | None:
        return self._steps[0] if len(self._steps) == 1 else None

    @property
    def newest_requests(self) -> Collection[str]:
        """Ids of the requests in the step that was sent last; empty if no step is in flight."""
        return {part.request_id for part in self._steps[-1].sequences} if self._steps else ()

    def push(self, batch: StepBatch) -> None:
        assert not self.is_full, "more steps in flight than the runner accepts"
        self._steps.append(batch)

    def pop(self, step_id: int) -> StepBatch:
        assert self._steps, f"step {step_id} returned but no step is in flight"
        batch = self._steps.popleft()
        assert batch.step_id == step_id, f"step {step_id} returned before step {batch.step_id}"
        return batch

    def validate(self, running: list[Sequence], blocks: BlockManager) -> None:
        """Raise AssertionError if the sequences' own counts disagree with the steps in flight."""
        parts: dict[str, list[SequenceStep]] = {s.request_id: [] for s in running}
        for step in self._steps:
            for part in step.sequences:
                assert part.request_id in parts, f"{part.request_id} is in a step and does not run"
                parts[part.request_id].append(part)
        for sequence in running:
            own = parts[sequence.request_id]
            assert sequence.in_flight == len(own), "a sequence miscounts its steps in flight"
            assert sequence.pending == sum(part.sample for part in own), "a sequence miscounts its pending tokens"
            needed = blocks.blocks_for(sequence.scheduled)
            assert needed <= len(sequence.blocks), "a step writes beyond its sequence's blocks"
            is_ending = sequence.state is ENDING
            assert own or not is_ending, "a request that has ended is in no step and still holds blocks"
            ahead = sum(len(part.tokens) for part in own)
            assert is_ending or sequence.computed + ahead == sequence.scheduled, "a sequence miscounts its tokens"
