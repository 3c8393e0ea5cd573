"""What clients may send: OpenAI's request bodies with vLLM's additions, and their checks. Pure.

Fields not named here are accepted and ignored; null stands for "not given" wherever a field has a default.
"""

import re
from typing import Any, TypeVar

import msgspec

from loraserve.gateway.errors import ApiError, bad_request, context_exceeded, unsupported
from loraserve.gateway.text.output import StopRules
from loraserve.messages import SamplingParams

T = TypeVar("T")

MAX_CHOICES = 128
MAX_STOPS = 32
MAX_STOP_CHARACTERS = 4096
MAX_LOGPROBS = 20
INT64 = 1 << 63


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What both endpoints share."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    n: int | None = None
    best_of: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    logit_bias: dict[str, float] | None = None
    response_format: Any = None
    user: str | None = None


class ContentPart(msgspec.Struct, frozen=True, kw_only=True):
    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: Any = None
    tool_call_id: str | None = None


class ChatRequest(GenerationRequest, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[int | str | list[int]] | None = None
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /tokenize, of a prompt or of messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /detokenize."""

    tokens: list[int]
    model: str | None = None


class LoadAdapterRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/load_lora_adapter."""

    lora_name: str | None = None
    lora_path: str | None = None
    load_inplace: bool | None = None


class UnloadAdapterRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/unload_lora_adapter."""

    lora_name: str | None = None


class RebalanceRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /admin/rebalance."""

    dry_run: bool | None = None


_PATH = re.compile(r" - at `(?P<path>[^`]*)`$")


def decode(body: bytes, type_: type[T]) -> T:
    """The request in ``body``. Raises ApiError 400 naming the field that has a wrong type."""
    try:
        return msgspec.json.decode(body or b"{}", type=type_)
    except msgspec.ValidationError as error:
        text = str(error)
        path = _PATH.search(text)
        param = path["path"].removeprefix("$").removeprefix(".") if path else None
        reason = text[: path.start()] if path else text
        raise bad_request(f"{param or 'request body'}: {reason}", param or None, "invalid_type") from error
    except RecursionError as error:
        raise bad_request("The request body is nested too deeply", code="invalid_json") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad_request(f"The request body is not valid JSON: {error}", code="invalid_json") from error


def check_common(request: GenerationRequest) -> None:
    """Raises ApiError 400 for a value out of range or a feature that is not there."""
    _check_ranges(request)
    _check_stops(request)
    n = 1 if request.n is None else request.n
    if request.best_of not in (None, 1, n):
        raise unsupported("best_of", "best_of: only 1 or the value of n is supported; ask for n choices instead")
    if request.logit_bias:
        raise unsupported("logit_bias", "logit_bias is not supported; leave it out")
    wanted = request.response_format
    if wanted is not None and not (isinstance(wanted, dict) and wanted.get("type") == "text"):
        raise unsupported("response_format", 'response_format: only {"type": "text"} is supported')


def check_chat(request: ChatRequest) -> None:
    """Raises ApiError 400 like ``check_common``, for what only chat has."""
    check_common(request)
    if not request.messages:
        raise bad_request("messages: at least one message is needed", "messages", "missing_required_parameter")
    if request.tools and request.tool_choice != "none":
        raise unsupported("tools", 'tools: tool calls are not supported; leave tools out or set tool_choice to "none"')
    if request.functions:
        raise unsupported("functions", "functions: function calls are not supported; leave them out")
    if request.chat_template is not None:
        raise unsupported("chat_template", "chat_template: only the model's own is used; leave it out")
    if request.top_logprobs is not None:
        if not request.logprobs:
            raise bad_request("top_logprobs: needs logprobs to be true", "top_logprobs", "invalid_value")
        _within("top_logprobs", request.top_logprobs, 0, MAX_LOGPROBS)
    _at_least_one("max_completion_tokens", request.max_completion_tokens)


def check_completion(request: CompletionRequest) -> None:
    """Raises ApiError 400 like ``check_common``, for what only completions have."""
    check_common(request)
    if request.suffix:
        raise unsupported("suffix", "suffix: insertion is not supported; leave it out")
    if request.logprobs is not None:
        _within("logprobs", request.logprobs, 0, MAX_LOGPROBS)
        if request.echo:
            raise unsupported("echo", "echo: cannot be combined with logprobs, no logprobs of the prompt are computed")


def stops_of(request: GenerationRequest) -> tuple[str, ...]:
    """The stop strings, none for null."""
    stop = request.stop
    return () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)


def _check_ranges(request: GenerationRequest) -> None:
    _at_least_one("max_tokens", request.max_tokens)
    _within("min_tokens", request.min_tokens, 0, None)
    _within("n", request.n, 1, MAX_CHOICES)
    _within("temperature", request.temperature, 0, 100)
    _within("top_k", request.top_k, -1, INT64 - 1)
    _within("min_p", request.min_p, 0, 1)
    _within("seed", request.seed, -INT64, INT64 - 1)
    _within("presence_penalty", request.presence_penalty, -2, 2)
    _within("frequency_penalty", request.frequency_penalty, -2, 2)
    for name, highest in (("top_p", 1.0), ("repetition_penalty", 100.0)):
        value = getattr(request, name)
        if value is not None and not 0 < value <= highest:
            raise _out_of_range(name, f"more than 0 and at most {highest:g}", value)


def _check_stops(request: GenerationRequest) -> None:
    stops = stops_of(request)
    if "" in stops:
        raise bad_request("stop: an empty string is no stop string; use null for none", "stop", "invalid_value")
    if len(stops) > MAX_STOPS or sum(map(len, stops)) > MAX_STOP_CHARACTERS:
        most = f"at most {MAX_STOPS} stop strings of {MAX_STOP_CHARACTERS} characters in all"
        raise bad_request(f"stop: {most} are accepted", "stop", "invalid_value")
    for token in request.stop_token_ids or ():
        _within("stop_token_ids", token, 0, INT64 - 1)


def _at_least_one(name: str, value: int | None) -> None:
    _within(name, value, 1, None)


def _within(name: str, value: float | None, lowest: float, highest: float | None) -> None:
    if value is None or (value >= lowest and (highest is None or value <= highest)):
        return
    raise _out_of_range(name, f"at least {lowest:g}" + ("" if highest is None else f" and at most {highest:g}"), value)


def _out_of_range(name: str, wanted: str, value: float) -> ApiError:
    return bad_request(f"{name}: must be {wanted}, found {value}", name, "invalid_value")


# MERGED: loraserve.gateway.api.schema
# """From a checked request to what the engine needs: limits, sampling parameters, stop rules. Pure."""


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


def stop_rules(request: GenerationRequest) -> StopRules:
    """Return what the gateway has to know to end and cut the text."""
    return StopRules(
        strings=stops_of(request),
        include=bool(request.include_stop_str_in_output),
        min_tokens=request.min_tokens or 0,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
