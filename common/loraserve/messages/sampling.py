"""Sampling parameters: the definition from which the HTTP schema, the wire format and the samplers derive.

To add a parameter:

1. Add a field to ``SamplingParams`` here, with its range and with the neutral value (the one that changes nothing) as
   its default. If the sampler needs the request's earlier tokens for it, add it to ``changes_logits``.
2. Apply it in ``engine/compute/sampler.py`` (one row at a time) and in ``engine/cuda/sampling.py`` (all rows at once).

The gateway accepts the field under the same name, refuses values outside the range and passes it on without further
code; the messages between the processes follow from the struct.
"""

from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import msgspec


class Range(NamedTuple):
    """The values that a client may give a parameter. ``lowest`` itself is excluded where ``above`` is set."""

    lowest: float
    highest: float | None = None
    above: bool = False


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the output tokens of one request are drawn. Names and meanings are those of OpenAI and vLLM.

    ``temperature`` 0 is greedy. ``top_k`` 0 and -1 mean no limit. The gateway chooses ``seed`` where the client gave
    none: the token at output index i depends on (seed, i) and on the logits alone, so engines are deterministic.
    ``logprobs`` None returns no log-probabilities, 0 that of the drawn token, n > 0 also those of the n most likely.
    ``stop_token_ids``, ``ignore_eos`` and ``min_tokens`` are explained in ``loraserve.messages.stop``.
    """

    max_tokens: Annotated[int, Range(1)]
    min_tokens: Annotated[int, Range(0)] = 0
    temperature: Annotated[float, Range(0, 100)] = 1.0
    top_p: Annotated[float, Range(0, 1, above=True)] = 1.0
    top_k: Annotated[int, Range(-1, (1 << 63) - 1)] = 0
    min_p: Annotated[float, Range(0, 1)] = 0.0
    seed: Annotated[int, Range(-(1 << 63), (1 << 63) - 1)] = 0
    presence_penalty: Annotated[float, Range(-2, 2)] = 0.0
    frequency_penalty: Annotated[float, Range(-2, 2)] = 0.0
    repetition_penalty: Annotated[float, Range(0, 100, above=True)] = 1.0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: Annotated[int | None, Range(0, 20)] = None

    def changes_logits(self, output_index: int) -> bool:
        """Return whether the token at this index is drawn from changed logits, which needs the request's history."""
        return (
            output_index < self.min_tokens
            or self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


_HINTS = get_type_hints(SamplingParams, include_extras=True)

FIELD_TYPES: dict[str, Any] = {
    name: get_args(hint)[0] if get_origin(hint) is Annotated else hint for name, hint in _HINTS.items()
}
"""The type of each parameter without its range, for schemas that accept the same fields."""

RANGES: dict[str, Range] = {name: get_args(hint)[1] for name, hint in _HINTS.items() if get_origin(hint) is Annotated}


def range_error(value: float | None, allowed: Range) -> str | None:
    """Return what is wrong with a value, None where it is in the range or not given."""
    lowest, highest, above = allowed
    if value is None or ((value > lowest if above else value >= lowest) and (highest is None or value <= highest)):
        return None
    limits = f"{'more than' if above else 'at least'} {lowest:g}" + (
        "" if highest is None else f" and at most {highest:g}"
    )
    return f"must be {limits}, found {value}"
