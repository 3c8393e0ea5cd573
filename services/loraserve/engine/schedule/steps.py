"""Forms the batch of the next step: decodes first, then prefill in chunks, preempting when blocks run out. Pure."""

from collections import deque
from collections.abc import Collection

from loraserve.engine.schedule.blocks import BlockManager
from loraserve.engine.schedule.events import SequenceStep, StepBatch
from loraserve.engine.schedule.sequence import RUNNING, Sequence, State


class StepBuilder:
    """Gives tokens and blocks to sequences until the step's budget or the blocks are spent.

    ``newest`` is who is in the step that was sent last. ``short`` says that one who runs waits for blocks which steps
    in flight will free.
    """

    def __init__(self, blocks: BlockManager, budget_tokens: int, newest: Collection[str]) -> None:
        self._blocks = blocks
        self._budget = budget_tokens
        self._newest = newest
        self._parts: dict[str, SequenceStep] = {}
        self.preempted: list[Sequence] = []
        self.short = False

    @property
    def budget(self) -> int:
        return self._budget

    def continue_running(self, running: list[Sequence]) -> None:
        """Every running sequence in order of arrival; those that decode go before those that prefill.

        Where blocks run out the latest arrival gives its own back, so that the oldest always gets on. Nobody gives
        back what a step in flight uses: who lacks blocks while in flight sits this step out, and one who finds only
        such victims lets nobody after it join, so that they can give way once they have landed.
        """
        decoding: list[Sequence] = []
        prefilling: list[Sequence] = []
        for sequence in running:
            if sequence.state is RUNNING and (not sequence.in_flight or self._follows(sequence)):
                (decoding if sequence.decodes_next else prefilling).append(sequence)
        for sequence in decoding + prefilling:
            if self._budget == 0:
                return
            if sequence in self.preempted:
                continue
            tokens = min(sequence.unscheduled, self._budget)
            while not self._grow(sequence, tokens):
                if sequence.in_flight:
                    self.short = True
                    break
                victim = self._victim(running, sequence)
                if victim is None:
                    self.short = True
                    return
                self._take_back(victim)
                if victim is sequence:
                    break
            else:
                self._add(sequence, tokens)

    def admit(self, sequence: Sequence) -> bool:
        """Begin a waiting sequence if all its known tokens fit beside what runs; it then is part of this step."""
        shared = self._share_prefix(sequence)
        needed = sequence.blocks_for(len(sequence.history) + 1) - len(shared)
        if needed > self._blocks.free:
            self._blocks.give_back(shared)
            return False
        sequence.blocks = tuple(shared)
        sequence.begin(len(shared) * self._blocks.block_tokens)
        if sequence.output_length == 0:
            sequence.cached_tokens = sequence.computed
        tokens = min(sequence.unscheduled, self._budget)
        grown = self._grow(sequence, tokens)
        assert grown, "free blocks vanished"
        return True

    def first_tokens(self, sequence: Sequence) -> int:
        """That this step would compute of a waiting sequence."""
        cached = self._cached_prefix(sequence) * self._blocks.block_tokens
        return min(len(sequence.history) - cached, self._budget)

    def begin(self, sequence: Sequence) -> None:
        """Add a sequence that ``admit`` let in, once it has its slot."""
        self._add(sequence, min(sequence.unscheduled, self._budget))

    def parts(self) -> tuple[SequenceStep, ...]:
        return tuple(self._parts.values())

    def _follows(self, sequence: Sequence) -> bool:
        """The token that a sequence in flight goes on with must be drawn by the step just before this one."""
        return sequence.request_id in self._newest and sequence.goes_ahead

    def _add(self, sequence: Sequence, tokens: int) -> None:
        part = sequence.step(tokens)
        sequence.sent(part)
        self._parts[sequence.request_id] = part
        self._budget -= tokens

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Blocks for the next ``tokens``; all or none."""
        missing = sequence.blocks_for(sequence.scheduled + tokens) - len(sequence.blocks)
        if missing <= 0:
            return True
        if missing > self._blocks.free:
            return False
        taken = []
        for _ in range(missing):
            block = self._blocks.take()
            assert block is not None, "free blocks vanished"
            taken.append(block)
        sequence.blocks += tuple(taken)
        return True

    def _victim(self, running: list[Sequence], sequence: Sequence) -> Sequence | None:
        """The latest arrival, or the sequence itself; None where another's blocks come free if it only waits."""
        later = [s for s in running if s not in self.preempted and s.order > sequence.order]
        ready = [s for s in later if not s.in_flight]
        if ready:
            return ready[-1]
        landing = [s for s in running if s.state is State.LEAVING] + later
        return None if any(s.request_id not in self._parts for s in landing) else sequence

    def _take_back(self, sequence: Sequence) -> None:
        self._blocks.give_back(sequence.blocks)
        sequence.blocks = ()
        sequence.begin(0)
        self.preempted.append(sequence)

    def _cached_prefix(self, sequence: Sequence) -> int:
        """So many blocks ``_share_prefix`` would find."""
        most = (len(sequence.history) - 1) // self._blocks.block_tokens
        return next((index for index in range(most) if not self._blocks.knows(sequence.digest(index))), most)

    def _share_prefix(self, sequence: Sequence) -> list[int]:
        """Blocks whose content is known already; the last known token is always computed, its output is wanted."""
        shared = []
        for index in range((len(sequence.history) - 1) // self._blocks.block_tokens):
            block = self._blocks.share(sequence.digest(index))
            if block is None:
                break
            shared.append(block)
        return shared


# MERGED: loraserve.engine.schedule.steps
# """The steps that were sent and have not come back, oldest first. Pure."""


class Outstanding:
    """At most ``most`` steps; they are computed, and come back, in the order in which they were sent."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._steps: deque[StepBatch] = deque()

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def full(self) -> bool:
        return len(self._steps) >= self._most

    @property
    def only(self) -> StepBatch | None:
        """The step that is out, where there is just one."""
        return self._steps[0] if len(self._steps) == 1 else None

    @property
    def newest(self) -> Collection[str]:
        """Who is in the step that was sent last."""
        return {part.request_id for part in self._steps[-1].sequences} if self._steps else ()

    def send(self, batch: StepBatch) -> None:
        assert not self.full, "more steps than the runner takes"
        self._steps.append(batch)

    def take(self, step_id: int) -> StepBatch:
        """The oldest step, which came back."""
        assert self._steps, "a step came back that nobody sent"
        batch = self._steps.popleft()
        assert batch.step_id == step_id, f"step {step_id} came back before {batch.step_id}"
        return batch

    def validate(self, running: list[Sequence]) -> None:
        """What the sequences know of their steps is what these are."""
        parts: dict[str, list[SequenceStep]] = {s.request_id: [] for s in running}
        for step in self._steps:
            for part in step.sequences:
                assert part.request_id in parts, f"{part.request_id} is in a step and does not run"
                parts[part.request_id].append(part)
        for sequence in running:
            own = parts[sequence.request_id]
            assert sequence.in_flight == len(own), "a step and its sequences disagree"
            assert sequence.drawing == sum(part.sample for part in own), "a sequence waits for no token of a step"
            assert sequence.blocks_for(sequence.scheduled) <= len(sequence.blocks), "a step writes where nothing is"
            leaving = sequence.state is State.LEAVING
            assert own or not leaving, "a request that has ended is held for nothing"
            ahead = sum(len(part.tokens) for part in own)
            assert leaving or sequence.computed + ahead == sequence.scheduled, "a sequence leaps or stands still"
