"""What one step computes and what it brings: the values that pass between the scheduler and the model runner.

Plain data, so that the scheduler stays pure.
"""

import msgspec

from loraserve.messages.base import SamplingParams

DRAWN = -1
"""In ``SequenceStep.tokens``: the token that the step sent just before draws for this sequence.

Nobody has seen it when the step is sent. It stands alone, as a sequence decodes one token a step.
"""


class SequenceStep(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One sequence's part of a step: the KV of ``tokens`` is computed and written, maybe a next token is drawn.

    ``slot`` is the adapter's, -1 the base model. ``start`` tokens have their KV already, so it is the position of the
    first of ``tokens``. ``blocks`` is the block table and covers ``start + len(tokens)`` positions. ``sample`` is set
    where ``tokens`` ends with the last token there is; the drawn one gets output index ``output_index``. ``history`` is
    prompt and output so far, read only where penalties need it: then it is whole and does not change before the step
    is done, since no step with penalties contains DRAWN. ``prompt_length`` says where the output begins.
    """

    request_id: str
    tokens: tuple[int, ...]
    start: int
    blocks: tuple[int, ...]
    sampling: SamplingParams
    prompt_length: int
    slot: int = -1
    sample: bool = True
    output_index: int = 0
    history: list[int] = msgspec.field(default_factory=list)


class StepBatch(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """All sequences of one step, each at most once."""

    step_id: int
    sequences: tuple[SequenceStep, ...]

    @property
    def prefill_tokens(self) -> int:
        """Those of sequences that do not decode; a preempted request's output is among them."""
        return sum(len(s.tokens) for s in self.sequences if s.output_index == 0 or len(s.tokens) > 1)


class Sampled(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A drawn token. ``logprob`` and ``top`` ((token, log-probability), best first) are filled where asked for."""

    request_id: str
    token: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


class StepResult(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a step brought, in the order of its sequences.

    ``duration_s`` is the time it took the model, without that of steps before it which it had to wait for. ``late`` are
    requests whose adapters arrived too late for some layer: what was computed and drawn for them means nothing.
    """

    step_id: int
    sampled: tuple[Sampled, ...]
    duration_s: float
    late: tuple[str, ...] = ()


def changes_logits(sampling: SamplingParams, output_index: int) -> bool:
    """Whether the token of this index is drawn from other logits than the model's, which takes the whole history."""
    return (
        output_index < sampling.min_tokens
        or sampling.repetition_penalty != 1.0
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
    )
