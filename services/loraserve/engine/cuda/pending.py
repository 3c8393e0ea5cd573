"""A step on its way through the GPU: its results are copied back behind it, and waited for once."""

from collections.abc import Sequence

import torch

from loraserve.engine.batch import Sampled, SequenceStep, StepResult
from loraserve.engine.cuda.errors import device_errors
from loraserve.engine.cuda.sampling import Drawn, sampled


class PendingGpuStep:
    """Made on the stream that computes, right after everything was launched. ``result`` may be called elsewhere."""

    def __init__(
        self, step_id: int, rows: Sequence[SequenceStep], drawn: Drawn | None, started: torch.cuda.Event
    ) -> None:
        self._step_id = step_id
        self._rows = rows
        self._results = [None if part is None else _sent_back(part) for part in results(drawn)]
        self._started = started
        self._device = torch.cuda.current_device()
        self._ended = torch.cuda.Event(enable_timing=True)
        self._ended.record()

    def result(self) -> StepResult:
        """Waits for the step; raises what the GPU reports. ``duration_s`` is the time on the GPU alone."""
        with device_errors(), torch.cuda.device(self._device):
            self._ended.synchronize()
        tokens = collect(self._rows, self._results)
        return StepResult(
            step_id=self._step_id, sampled=tokens, duration_s=self._started.elapsed_time(self._ended) / 1e3
        )


def results(drawn: Drawn | None) -> tuple[torch.Tensor | None, ...]:
    """What is to be read back; nothing where nobody drew."""
    return (drawn.tokens, drawn.logprobs, drawn.top_tokens, drawn.top_logprobs) if drawn else ()


def collect(rows: Sequence[SequenceStep], parts: Sequence[torch.Tensor | None]) -> tuple[Sampled, ...]:
    """From what ``results`` gave, on the host by now, to tokens."""
    arrays = [None if part is None else part.numpy() for part in parts]
    return tuple(sampled(rows, *arrays)) if arrays else ()  # type: ignore[arg-type]


def _sent_back(tensor: torch.Tensor) -> torch.Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
