"""When an output ends, and what each side says about it: the contract between engine and gateway.

The engine sees tokens and decides about them; the gateway sees text and decides about stop strings. An output ends

- with an EOS token of the model, unless the request has ``ignore_eos``: finish reason ``stop``, stop reason None;
- with one of the request's ``stop_token_ids``: ``stop``, and the stop reason is that token id;
- with a stop string (decided by the gateway, which aborts the request on the engine): ``stop``, and the string;
- with ``max_tokens`` tokens, or at the end of the context: ``length``, None.

Neither tokens nor strings end an output that would have fewer than ``min_tokens`` tokens before the stop; the sampler
draws no EOS and no stop token until then. A token that is both EOS and in ``stop_token_ids`` counts as EOS. A stop on
the last of ``max_tokens`` gives ``stop``.

The token that ends the output is the last of ``TokenDelta.tokens``, whatever the finish reason. ``completion_tokens``
counts it, and log-probabilities include it. An EOS or stop token becomes text only with
``include_stop_str_in_output``, as does a stop string; without it the text ends before the stop.

The engine alone reads which tokens are EOS (``loraserve.eos_tokens``). All meanings are vLLM's.
"""

from collections.abc import Iterable, Set
from typing import Final, NamedTuple

from loraserve.messages.sampling import SamplingParams

STOP: Final = "stop"
LENGTH: Final = "length"
ABORT: Final = "abort"

MAX_STOP_TOKEN_IDS = 256
"""The engine compares every drawn token with all of them."""

MAX_STOP_STRINGS = 32
MAX_STOP_CHARACTERS = 4096
"""Of all stop strings of a request together; the gateway compares every character of the output with each string."""


class Finish(NamedTuple):
    """How an output ended: the finish reason, and the stop token of the request that ended it, if one did."""

    finish: str | None
    stop_reason: int | None = None


GOES_ON = Finish(None)


def finish_of(token: int, index: int, sampling: SamplingParams, max_tokens: int, eos: Set[int]) -> Finish:
    """Return whether and how the output ends with ``token`` at output index ``index``. The engine's side."""
    if index >= sampling.min_tokens:
        if token in eos and not sampling.ignore_eos:
            return Finish(STOP)
        if token in sampling.stop_token_ids:
            return Finish(STOP, token)
    return Finish(LENGTH) if index + 1 >= max_tokens else GOES_ON


def forbidden_tokens(sampling: SamplingParams, index: int, eos: Iterable[int], vocab: int) -> list[int]:
    """Return the tokens that must not be drawn at output index ``index``. The engine's sampler uses this."""
    if index >= sampling.min_tokens:
        return []
    return [token for token in (*eos, *sampling.stop_token_ids) if 0 <= token < vocab]


def shown_count(tokens: int, finish: str | None, include_stop: bool) -> int:
    """Return how many of the ``tokens`` received become text. The gateway's side: all but a stop token at the end."""
    return tokens - 1 if finish == STOP and tokens and not include_stop else tokens
