"""Forms the batch of the next step: decodes first, then prefill in chunks, preempting when blocks run out. Pure."""

from loraserve.engine.batch import SequenceStep
from loraserve.engine.blocks import BlockManager
from loraserve.engine.sequence import Sequence


class StepBuilder:
    """Gives tokens and blocks to sequences until the step's budget or the blocks are spent."""

    def __init__(self, blocks: BlockManager, budget_tokens: int) -> None:
        self._blocks = blocks
        self._budget = budget_tokens
        self._parts: dict[str, SequenceStep] = {}
        self.preempted: list[Sequence] = []

    @property
    def budget(self) -> int:
        return self._budget

    def continue_running(self, running: list[Sequence]) -> None:
        """Every running sequence in order of arrival; those that decode go before those that prefill.

        Where blocks run out the latest arrival gives its own back, so that the oldest always gets on.
        """
        order = [s for s in running if s.decoding] + [s for s in running if not s.decoding]
        for sequence in order:
            if self._budget == 0:
                return
            if sequence in self.preempted:
                continue
            tokens = min(sequence.remaining, self._budget)
            while not self._grow(sequence, tokens):
                victim = self._victim(running, sequence)
                self._take_back(victim)
                if victim is sequence:
                    break
            else:
                self._add(sequence, tokens)

    def admit(self, sequence: Sequence, prefix_cache: bool) -> bool:
        """Begin a waiting sequence if all its known tokens fit beside what runs; it then is part of this step."""
        shared = self._share_prefix(sequence) if prefix_cache else []
        needed = sequence.blocks_for(len(sequence.history) + 1) - len(shared)
        if needed > self._blocks.free:
            self._blocks.give_back(shared)
            return False
        sequence.blocks = shared
        sequence.computed = len(shared) * self._blocks.block_tokens
        if sequence.output_length == 0:
            sequence.cached_tokens = sequence.computed
        tokens = min(sequence.remaining, self._budget)
        grown = self._grow(sequence, tokens)
        assert grown, "free blocks vanished"
        return True

    def begin(self, sequence: Sequence) -> None:
        """Add a sequence that ``admit`` let in, once it has its slot."""
        self._add(sequence, min(sequence.remaining, self._budget))

    def parts(self) -> tuple[SequenceStep, ...]:
        return tuple(self._parts.values())

    def _add(self, sequence: Sequence, tokens: int) -> None:
        self._parts[sequence.request_id] = sequence.step(tokens)
        self._budget -= tokens
        sequence.in_step = True

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Blocks for the next ``tokens``; all or none."""
        missing = sequence.blocks_for(sequence.computed + tokens) - len(sequence.blocks)
        if missing > self._blocks.free:
            return False
        for _ in range(missing):
            block = self._blocks.take()
            assert block is not None, "free blocks vanished"
            sequence.blocks.append(block)
        return True

    def _victim(self, running: list[Sequence], sequence: Sequence) -> Sequence:
        later = [s for s in running if not s.in_step and s not in self.preempted and s.order > sequence.order]
        return later[-1] if later else sequence

    def _take_back(self, sequence: Sequence) -> None:
        self._blocks.give_back(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0
        self.preempted.append(sequence)

    def _share_prefix(self, sequence: Sequence) -> list[int]:
        """Blocks whose content is known already; the last known token is always computed, its output is wanted."""
        shared = []
        for index in range((len(sequence.history) - 1) // self._blocks.block_tokens):
            block = self._blocks.share(sequence.digest(index))
            if block is None:
                break
            shared.append(block)
        return shared
