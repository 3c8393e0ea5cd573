"""The contract between engine and gateway about the end of an output. All meanings are vLLM's.

The engine checks tokens, and the gateway checks stop strings in the text. An output ends

- at an EOS token of the model, unless ``ignore_eos`` is set: finish reason ``stop``, stop reason None;
- at one of the request's ``stop_token_ids``: finish reason ``stop``, stop reason that token id;
- at a stop string, where the gateway aborts the request on the engine: finish reason ``stop``, stop reason the string;
- after ``max_tokens`` tokens or at the end of the context: finish reason ``length``, stop reason None.

No stop counts before the output has ``min_tokens`` tokens, and the sampler draws no EOS or stop token until then. A
token that is both EOS and in ``stop_token_ids`` counts as EOS, unless ``ignore_eos`` is set. If the last of
``max_tokens`` tokens is a stop, the finish reason is ``stop``.

The last token of ``TokenDelta.tokens`` is the token that ended the output, whatever the finish reason.
``completion_tokens`` and the log-probabilities include it. The text includes an EOS token, stop token or stop string
only with ``include_stop_str_in_output``. Without it, the text ends before the stop.

Only the engine knows which tokens are EOS (``loraserve.eos_tokens``).
"""

from collections.abc import Iterable, Set
from typing import Final, NamedTuple

from loraserve.messages.sampling import SamplingParams

STOP: Final = "stop"
LENGTH: Final = "length"

MAX_STOP_TOKEN_IDS = 256
"""The limit bounds the work of the engine, which compares every drawn token with all ids."""

MAX_STOP_STRINGS = 32
MAX_STOP_CHARACTERS = 4096
"""Total over a request's stop strings. The gateway compares every output character with each string."""


class Finish(NamedTuple):
    """The finish reason, or None while the output continues. ``stop_reason`` is the stop token id, if any."""

    finish: str | None
    stop_reason: int | None = None


GOES_ON = Finish(None)


def finish_of(token: int, index: int, sampling: SamplingParams, max_tokens: int, eos: Set[int]) -> Finish:
    """Return how the output ends with ``token`` at output index ``index``, or GOES_ON. Used by the engine."""
    if index >= sampling.min_tokens:
        if token in eos and not sampling.ignore_eos:
            return Finish(STOP)
        if token in sampling.stop_token_ids:
            return Finish(STOP, token)
    return Finish(LENGTH) if index + 1 >= max_tokens else GOES_ON


def forbidden_tokens(sampling: SamplingParams, index: int, eos: Iterable[int], vocab: int) -> list[int]:
    """Return the tokens that the sampler must not draw at output index ``index``."""
    if index >= sampling.min_tokens:
        return []
    return [token for token in (*eos, *sampling.stop_token_ids) if 0 <= token < vocab]


def shown_count(tokens: int, finish: str | None, include_stop: bool) -> int:
    """Return how many of ``tokens`` new tokens become text. A final stop token counts only with ``include_stop``."""
    return tokens - 1 if finish == STOP and tokens and not include_stop else tokens
