"""Defines the sampling parameters. The HTTP schema, the wire format and the samplers derive from this definition.

To add a parameter:

1. Add a field to ``SamplingParams`` with its range. Its default is the value that has no effect. If the parameter
   forbids tokens or depends on the request's earlier tokens, add it to ``changes_logits``.
2. Apply it in ``engine/compute/sampler.py`` (one row at a time) and in ``engine/cuda/sampling.py`` (all rows at once).

The gateway and the messages need no change: the gateway accepts a field of this name in requests, checks its range and
passes it on.
"""

from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import msgspec


class Range(NamedTuple):
    """The allowed values of a parameter, ``lowest`` to ``highest``. If ``above``, ``lowest`` itself is not allowed."""

    lowest: float
    highest: float | None = None
    above: bool = False


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """The sampling parameters of one request, with the names and meanings of OpenAI and vLLM.

    ``temperature`` 0 is greedy. ``top_k`` 0 and -1 mean no limit. If the client sets no ``seed``, the gateway chooses
    one. The token at output index i depends only on (seed, i) and the logits, so engines are deterministic.
    ``logprobs`` None returns no log-probabilities. n >= 0 returns those of the drawn token and of the n most likely.
    ``loraserve.messages.stop`` explains ``stop_token_ids``, ``ignore_eos`` and ``min_tokens``.
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
        """Return whether ``min_tokens`` forbids EOS and stop tokens at this index, or a penalty is set."""
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
"""Maps each parameter to its type without the range, for the HTTP schema."""

RANGES: dict[str, Range] = {name: get_args(hint)[1] for name, hint in _HINTS.items() if get_origin(hint) is Annotated}


def range_error(value: float | None, allowed: Range) -> str | None:
    """Return an error message for a value outside ``allowed``, or None if the value is None or allowed."""
    lowest, highest, above = allowed
    if value is None or ((value > lowest if above else value >= lowest) and (highest is None or value <= highest)):
        return None
    limits = f"{'more than' if above else 'at least'} {lowest:g}" + (
        "" if highest is None else f" and at most {highest:g}"
    )
    return f"must be {limits}, found {value}"
