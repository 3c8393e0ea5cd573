"""The steps that were sent and have not come back, oldest first. Pure."""

from collections import deque
from collections.abc import Collection

from loraserve.engine.batch import SequenceStep, StepBatch
from loraserve.engine.sequence import Sequence, State


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
