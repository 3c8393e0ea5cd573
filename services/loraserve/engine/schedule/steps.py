"""Forms the next step, limits overtaking among waiting requests, and tracks the steps in flight.

Decodes get the step's tokens first, then prefills in chunks (continuous batching with chunked prefill). When KV blocks
run out, the latest arrival is preempted: its blocks are released, and it will be recomputed.

A waiting request whose adapter is not in the pool is skipped, and later requests may start. New requests could keep the
resident adapters in use forever, and the skipped request would never run. After MAX_OVERTAKEN later requests have
started, the skipped request therefore reserves a place: a set of resident adapters to evict for its adapter. No new
request may start with these adapters, so they become evictable when their running requests end. Those requests may run
for long, so one more place is reserved after each further MAX_OVERTAKEN starts.
"""

from collections import deque
from collections.abc import Callable, Collection

from loraserve.engine.schedule.blocks import BlockManager
from loraserve.engine.schedule.events import SequenceStep, StepBatch
from loraserve.engine.schedule.sequence import ENDING, RUNNING, Sequence
from loraserve.messages import AdapterRef


class StepBuilder:
    """Assigns tokens and KV blocks to sequences until the token budget or the blocks are used up.

    ``previous`` holds the ids of the requests in the step sent last. ``waits_for_blocks`` is true if a running sequence
    must wait for blocks that steps in flight use. Then no waiting request may start in this step.
    """

    def __init__(self, blocks: BlockManager, budget_tokens: int, previous: Collection[str]) -> None:
        self._blocks = blocks
        self._previous = previous
        self._parts: dict[str, SequenceStep] = {}
        self.budget = budget_tokens
        self.preempted: list[Sequence] = []
        self.waits_for_blocks = False

    def add_running(self, running: list[Sequence]) -> None:
        """Add the running sequences in order of arrival, decodes before prefills.

        When blocks run out, the latest arrivals are preempted, so that the oldest request always makes progress. A
        sequence in flight cannot be preempted, because its step uses its blocks. If such a sequence lacks blocks, it is
        left out of this step. If all possible victims are in flight, no further sequence is added, so that the victims
        can be preempted when their steps are done.
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
        """Allocate a waiting sequence's blocks for a step. Returns False if its history and one token do not fit."""
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
        """Add a sequence for which `allocate_waiting` has allocated blocks."""
        self._add_part(sequence, min(sequence.unscheduled, self.budget))

    def first_tokens(self, sequence: Sequence) -> int:
        """Return how many tokens of a waiting sequence this step would compute."""
        cached = self._count_cached_prefix(sequence) * self._blocks.block_tokens
        return min(len(sequence.history) - cached, self.budget)

    def parts(self) -> tuple[SequenceStep, ...]:
        return tuple(self._parts.values())

    def _can_follow(self, sequence: Sequence) -> bool:
        """Return whether a sequence in flight can join this step: it is in the step sent last and can run ahead."""
        return sequence.request_id in self._previous and sequence.can_run_ahead

    def _add_part(self, sequence: Sequence, tokens: int) -> None:
        part = sequence.next_part(tokens)
        sequence.part_sent(part)
        self._parts[sequence.request_id] = part
        self.budget -= tokens

    def _allocate(self, sequence: Sequence, tokens: int) -> bool:
        """Allocate the blocks for the sequence's next ``tokens`` tokens. Returns False if too few blocks are free."""
        missing = self._blocks.blocks_for(sequence.scheduled + tokens) - len(sequence.blocks)
        if missing <= 0:
            return True
        allocated = self._blocks.allocate(missing)
        if allocated is None:
            return False
        sequence.blocks += allocated
        return True

    def _choose_victim(self, running: list[Sequence], sequence: Sequence) -> Sequence | None:
        """Return the sequence to preempt: the latest arrival after ``sequence`` that is in no step, or ``sequence``.

        Returns None if sequences in flight will free blocks, or can be preempted, when their steps are done.
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
        """Add a reference to each cached block of the sequence's prefix and return the blocks."""
        found = []
        for index in range(self._shareable_blocks(sequence)):
            block = self._blocks.acquire_cached(sequence.block_digest(index))
            if block is None:
                break
            found.append(block)
        return found

    def _shareable_blocks(self, sequence: Sequence) -> int:
        """Return the number of full blocks before the last known token, whose logits must be computed."""
        return (len(sequence.history) - 1) // self._blocks.block_tokens


class StepPipeline:
    """The steps in flight: sent to the runner and not yet done. They finish in the order of sending."""

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
        """Ids of the requests in the step sent last. Empty if no step is in flight."""
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
        """Raise AssertionError if a counter of a sequence disagrees with the steps in flight."""
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


MAX_OVERTAKEN = 64
"""Number of later requests that may start before a skipped request reserves memory in the pool."""


class OvertakingLimit:
    """Applies the limit on overtaking during one pass over the waiting requests, in order of arrival.

    Only the first request over the limit reserves memory in the pool. ``find_blocking(adapter, places)`` returns the
    versions to evict for ``adapter``: the union of the ``places`` cheapest sets.
    """

    def __init__(self, find_blocking: Callable[[AdapterRef | None, int], frozenset[str]]) -> None:
        self._find_blocking = find_blocking
        self._skipped: list[Sequence] = []
        self._reserved: frozenset[str] | None = None

    def skip(self, sequence: Sequence) -> None:
        """Record that the request waits for its adapter. If it was overtaken too often, reserve memory for it."""
        self._skipped.append(sequence)
        if self._reserved is None and sequence.overtaken >= MAX_OVERTAKEN:
            self._reserved = self._find_blocking(sequence.admit.adapter, sequence.overtaken // MAX_OVERTAKEN)

    def may_start(self, sequence: Sequence) -> bool:
        """Return False if the request's adapter occupies reserved memory, else True."""
        return not self._reserved or sequence.version not in self._reserved

    def record_start(self, sequence: Sequence) -> None:
        """Count this start for all skipped requests. Base-model requests do not count: they use no pool memory."""
        if sequence.version:
            for other in self._skipped:
                other.overtaken += 1
