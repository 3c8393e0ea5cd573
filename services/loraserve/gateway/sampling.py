"""From a checked request to what the engine needs: limits, sampling parameters, stop rules. Pure."""

from loraserve.gateway.assemble import StopRules
from loraserve.gateway.errors import bad_request, context_exceeded
from loraserve.gateway.openai_schema import INT64, GenerationRequest, stops_of
from loraserve.messages import SamplingParams


def output_limit(wanted: int | None, prompt_tokens: int, context: int, default: int, param: str) -> int:
    """Tokens that the output may have. ``default`` (0: as many as fit) is for requests that name none.

    Raises ApiError 400 where prompt and output do not fit the ``context``.
    """
    if prompt_tokens == 0:
        raise bad_request(
            f"{param}: it has no tokens; the model needs at least one to continue", param, "invalid_value"
        )
    left = context - prompt_tokens
    if left < 1 or (wanted or 0) > left:
        raise context_exceeded(context, prompt_tokens, wanted or 1, param)
    return wanted or (min(default, left) if default else left)


def sampling_params(
    request: GenerationRequest, max_tokens: int, logprobs: int | None, seed: int, choice: int
) -> SamplingParams:
    """What the engine draws the given choice with; choices of one request differ by their seed."""
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        message = f"min_tokens: {min_tokens} is more than the {max_tokens} tokens that the output may have"
        raise bad_request(message, "min_tokens", "invalid_value")
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=_or(request.temperature, 1.0),
        top_p=_or(request.top_p, 1.0),
        top_k=max(request.top_k or 0, 0),
        min_p=_or(request.min_p, 0.0),
        seed=(seed + choice) % INT64,
        presence_penalty=_or(request.presence_penalty, 0.0),
        frequency_penalty=_or(request.frequency_penalty, 0.0),
        repetition_penalty=_or(request.repetition_penalty, 1.0),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        ignore_eos=bool(request.ignore_eos),
        logprobs=logprobs,
    )


def stop_rules(request: GenerationRequest, end_tokens: frozenset[int]) -> StopRules:
    """What ends the text, as the gateway sees it. ``end_tokens`` are the model's."""
    return StopRules(
        strings=stops_of(request),
        end_tokens=frozenset() if request.ignore_eos else end_tokens,
        stop_tokens=frozenset(request.stop_token_ids or ()),
        include=bool(request.include_stop_str_in_output),
        min_tokens=request.min_tokens or 0,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
