"""A CPU runner that accepts steps ahead, like a GPU's runner."""

from typing import Any

import msgspec

from loraserve.engine.compute.protocol import PendingStep, Runner
from loraserve.engine.schedule.events import PENDING_TOKEN, StepBatch


class StepsAheadRunner:
    """Wraps a CPU runner. It computes a step when the step is submitted, and resolves PENDING_TOKEN itself."""

    def __init__(self, runner: Runner, steps_ahead: int) -> None:
        self._runner = runner
        self._last_sampled: dict[str, int] = {}
        self.steps_ahead = steps_ahead

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def submit(self, batch: StepBatch) -> PendingStep:
        """Compute the step. A pending token of a failed step becomes 0."""
        sequences = tuple(
            msgspec.structs.replace(s, tokens=(self._last_sampled.get(s.request_id, 0),))
            if s.tokens[0] == PENDING_TOKEN
            else s
            for s in batch.sequences
        )
        step = self._runner.submit(msgspec.structs.replace(batch, sequences=sequences))
        self._last_sampled = {s.request_id: s.token for s in step.result().sampled}
        return step
