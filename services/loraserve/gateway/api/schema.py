"""Request bodies: OpenAI's fields with vLLM's additions, and the checks of their values.

Null means that a field is absent. Fields that can be large or contain arbitrary JSON stay raw until their size is
checked. ``api/fields.py`` defines the handling of fields that are not declared here.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from loraserve.gateway.api.fields import REFUSED
from loraserve.gateway.context import GATEWAY
from loraserve.gateway.errors import ApiError, bad_request, context_exceeded, unsupported
from loraserve.gateway.text.output import StopRules
from loraserve.messages import SamplingParams
from loraserve.messages.sampling import FIELD_TYPES, RANGES, Range, range_error
from loraserve.messages.stop import MAX_STOP_CHARACTERS, MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS

T = TypeVar("T")

MAX_CHOICES = 128
INT64 = 1 << 63
NULL = msgspec.Raw(b"null")

MAX_STOP_BYTES = 6 * MAX_STOP_CHARACTERS + 1024
"""JSON needs up to six bytes for a character. The other 1024 bytes are for quotes, commas and spaces."""


INLINE_BYTES = 64 << 10
"""A body of this size is decoded in less than a millisecond. A thread decodes larger bodies."""

SLICE_BYTES = 128 << 10
"""msgspec blocks all threads while it decodes: 100 ms for 8 MB of token ids, 2 ms for a slice of this size."""


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Fields that chat and completion requests share and that the gateway itself reads.

    ``decode_request`` also accepts the other sampling parameters. The gateway passes them to the engine unchanged.
    """

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    min_tokens: int | None = None
    n: int | None = None
    best_of: int | None = None
    seed: int | None = None
    stop: msgspec.Raw = NULL
    stop_token_ids: msgspec.Raw = NULL
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None


class ContentPart(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: msgspec.Raw = NULL
    function_call: msgspec.Raw = NULL
    prefix: msgspec.Raw = NULL
    tool_call_id: str | None = None


class ChatRequest(GenerationRequest, frozen=True, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: msgspec.Raw = NULL
    tool_choice: msgspec.Raw = NULL
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: msgspec.Raw = NULL


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """Body of POST /v1/completions."""

    prompt: msgspec.Raw = NULL
    logprobs: int | None = None
    echo: bool | None = None


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of POST /tokenize, with either a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: msgspec.Raw = NULL
    return_token_strs: bool | None = None
    tools: msgspec.Raw = NULL
    chat_template: msgspec.Raw = NULL


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of POST /detokenize."""

    tokens: msgspec.Raw
    model: str | None = None


class LoadAdapterRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of POST /v1/load_lora_adapter."""

    lora_name: str | None = None
    lora_path: str | None = None
    load_inplace: bool | None = None


class UnloadAdapterRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of POST /v1/unload_lora_adapter."""

    lora_name: str | None = None


class RebalanceRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of POST /admin/rebalance."""

    dry_run: bool | None = None


def _refused_fields(type_: type[GenerationRequest]) -> tuple[str, ...]:
    return tuple(name for name in REFUSED if name not in type_.__struct_fields__)


def _complete(type_: type[GenerationRequest]) -> type:
    """Return a subclass that also declares the other sampling parameters and the refused fields."""
    sampling = [(name, kind | None, None) for name, kind in FIELD_TYPES.items() if name not in type_.__struct_fields__]
    refused = [(name, msgspec.Raw, NULL) for name in _refused_fields(type_)]
    return msgspec.defstruct(type_.__name__, [*sampling, *refused], bases=(type_,), frozen=True, kw_only=True)


_COMPLETE: dict[type, type] = {type_: _complete(type_) for type_ in (ChatRequest, CompletionRequest)}
_REFUSED_CHAT, _REFUSED_COMPLETION = _refused_fields(ChatRequest), _refused_fields(CompletionRequest)

_PATH = re.compile(r" - at `(?P<path>[^`]*)`$")


async def read_request(http: web.Request, type_: type[T]) -> tuple[T, int]:
    """Return the decoded request body and its size in bytes. Raises ApiError 400 like ``decode_request``."""
    body = await http.read()
    if len(body) <= INLINE_BYTES:
        return decode_request(body, type_), len(body)
    return await http.app[GATEWAY].tokenizer.run(len(body), decode_request, body, type_), len(body)


def decode_request(body: bytes, type_: type[T]) -> T:
    """Decode a request body. Raises ApiError 400 for invalid JSON, and for a wrong type with the field's name."""
    decoded: T = decode_field(body or b"{}", _COMPLETE.get(type_, type_), "")
    return decoded


def decode_field(data: bytes | msgspec.Raw, type_: Any, field: str) -> Any:
    """Decode one raw field. Raises ApiError 400 for invalid JSON, and for a wrong type with the value's path."""
    try:
        return msgspec.json.decode(data, type=type_)
    except msgspec.ValidationError as error:
        text = str(error)
        path = _PATH.search(text)
        param = (field + (path["path"].removeprefix("$") if path else "")).removeprefix(".")
        reason = text[: path.start()] if path else text
        raise bad_request(f"{param or 'request body'}: {reason}", param or None, "invalid_type") from error
    except RecursionError as error:
        raise bad_request("The request body is nested too deeply", code="invalid_json") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad_request(f"The request body is not valid JSON: {error}", code="invalid_json") from error


def decode_token_ids(data: msgspec.Raw, field: str) -> Iterator[list[int]]:
    """Yield lists of token ids, each from about SLICE_BYTES of JSON. Raises ApiError 400 if not a list of integers."""
    text = bytes(data)
    if text[:1] != b"[":
        raise _no_token_ids(field)
    start, end = 1, len(text) - 1
    while start < end:
        cut = text.find(b",", min(start + SLICE_BYTES, end), end)
        stop = end if cut < 0 else cut
        try:
            yield msgspec.json.decode(b"[%b]" % text[start:stop], type=list[int])
        except msgspec.DecodeError as error:
            raise _no_token_ids(field) from error
        start = stop + 1


def _check_generation(request: GenerationRequest, refused: tuple[str, ...]) -> None:
    # Absent fields hold the NULL object itself, so the identity test skips nearly all of a hundred fields.
    for name in [name for name in refused if getattr(request, name) is not NULL]:
        _refuse(name, getattr(request, name))
    for name, allowed in RANGES.items():
        if name != "logprobs":
            _check_range(name, getattr(request, name), allowed)
    _check_range("n", request.n, Range(1, MAX_CHOICES))
    _check_range("max_completion_tokens", request.max_completion_tokens, RANGES["max_tokens"])
    n = 1 if request.n is None else request.n
    if request.best_of not in (None, 1, n):
        raise unsupported("best_of", "best_of: only 1 and the value of n are supported; ask for n choices instead")
    stop_strings(request)
    stop_token_ids(request)


def check_chat(request: ChatRequest) -> None:
    """Raise ApiError 400 for an invalid value, a refused field, missing messages, or top_logprobs without logprobs."""
    _check_generation(request, _REFUSED_CHAT)
    if not request.messages:
        raise bad_request("messages: at least one message is needed", "messages", "missing_required_parameter")
    _refuse("tool_choice", request.tool_choice)
    if bytes(request.tool_choice) != b'"none"':
        _refuse("tools", request.tools)
    if request.top_logprobs is not None:
        if not request.logprobs:
            raise bad_request("top_logprobs: needs logprobs to be true", "top_logprobs", "invalid_value")
        _check_range("top_logprobs", request.top_logprobs, RANGES["logprobs"])


def check_completion(request: CompletionRequest) -> None:
    """Raise ApiError 400 for an invalid value, a refused field, or ``echo`` with ``logprobs``."""
    _check_generation(request, _REFUSED_COMPLETION)
    _check_range("logprobs", request.logprobs, RANGES["logprobs"])
    if request.logprobs is not None and request.echo:
        reason = "cannot be combined with logprobs, because those of the prompt are not computed"
        raise unsupported("echo", f"echo: {reason}; leave one of the two out")


def check_tokenize(request: TokenizeRequest) -> None:
    """Raise ApiError 400 for ``tools`` or ``chat_template``, and if both or neither of prompt and messages are set."""
    _refuse("tools", request.tools)
    _refuse("chat_template", request.chat_template)
    if (request.prompt is None) == (not request.messages):
        raise bad_request("prompt: give either prompt or messages", "prompt", "missing_required_parameter")


def stop_strings(request: GenerationRequest) -> tuple[str, ...]:
    """Return the stop strings. Raises ApiError 400 if they are too many, too long or empty."""
    if request.stop is NULL:
        return ()
    if len(bytes(request.stop)) > MAX_STOP_BYTES:
        raise _too_many_stops()
    given: str | list[str] | None = decode_field(request.stop, str | list[str] | None, "stop")
    strings = (given,) if isinstance(given, str) else tuple(given or ())
    if len(strings) > MAX_STOP_STRINGS or sum(map(len, strings)) > MAX_STOP_CHARACTERS:
        raise _too_many_stops()
    if "" in strings:
        raise bad_request("stop: a stop string must not be empty; use null for none", "stop", "invalid_value")
    return strings


def stop_token_ids(request: GenerationRequest) -> tuple[int, ...]:
    """Return the stop token ids. Raises ApiError 400 for too many ids and for ids outside 0 to 2**63 - 1."""
    if request.stop_token_ids is NULL:
        return ()
    if bytes(request.stop_token_ids).count(b",") >= MAX_STOP_TOKEN_IDS:
        message = f"stop_token_ids: at most {MAX_STOP_TOKEN_IDS} ids are accepted; send fewer, or use stop"
        raise bad_request(message, "stop_token_ids", "invalid_value")
    ids: list[int] = decode_field(request.stop_token_ids, list[int] | None, "stop_token_ids") or []
    for token in ids:
        _check_range("stop_token_ids", token, Range(0, INT64 - 1))
    return tuple(ids)


def prompt_items(prompt: msgspec.Raw, context_tokens: int) -> Sequence[str] | Sequence[list[int]]:
    """Return the prompts of a completion request. ``prompt`` is a text, a list of token ids, or a list of either.

    Raises ApiError 400 for other types, for more than ``MAX_CHOICES`` prompts, and for a list of ids that leaves no
    space for one output token in the context. Prompts, and the ids of a single list, are counted before decoding.
    """
    data = bytes(prompt)
    inner = data[1:].lstrip()
    if data in (b"null", b"") or inner[:1] == b"]":
        raise bad_request("prompt: a text, token ids or a list of either is needed", "prompt", "invalid_value")
    if data[:1] != b"[":
        return [decode_field(prompt, str, "prompt")]
    if inner[:1] == b"[":
        _check_prompts(data.count(b"[") - 1)
        lists: list[list[int]] = _decode_prompts(prompt, list[list[int]])
        _check_ids(max(map(len, lists)), context_tokens)
        return lists
    if inner[:1] == b'"':
        # An escaped quote does not end a text. An escaped backslash before a closing quote makes this count too low.
        # The decoded list is therefore counted again.
        _check_prompts((data.count(b'"') - data.count(b'\\"')) // 2)
        texts: list[str] = _decode_prompts(prompt, list[str])
        _check_prompts(len(texts))
        return texts
    _check_ids(data.count(b",") + 1, context_tokens)
    return [_decode_prompts(prompt, list[int])]


def sampling_params(
    request: GenerationRequest, max_tokens: int, logprobs: int | None, seed: int, choice: int
) -> SamplingParams:
    """Return the sampling parameters of one choice, whose seed is ``seed + choice``.

    Raises ApiError 400 if min_tokens is larger than ``max_tokens``.
    """
    given = {name: getattr(request, name, None) for name in FIELD_TYPES}
    passed = {name: value for name, value in given.items() if value is not None}
    passed |= {
        "max_tokens": max_tokens,
        "top_k": max(passed.get("top_k", 0), 0),
        "seed": (seed + choice) % INT64,
        "stop_token_ids": stop_token_ids(request),
        "logprobs": logprobs,
    }
    params = SamplingParams(**passed)
    if params.min_tokens > max_tokens:
        reason = f"{params.min_tokens} is more than the {max_tokens} tokens that the output may have"
        raise bad_request(f"min_tokens: {reason}", "min_tokens", "invalid_value")
    return params


def stop_rules(request: GenerationRequest) -> StopRules:
    return StopRules(
        strings=stop_strings(request),
        include=bool(request.include_stop_str_in_output),
        min_tokens=request.min_tokens or 0,
    )


def check_token_ids(tokens: Sequence[int], vocab: int, param: str) -> None:
    """Raise ApiError 400 for token ids outside the range 0 to ``vocab`` - 1."""
    for token in (min(tokens), max(tokens)) if tokens else ():
        if not 0 <= token < vocab:
            message = f"{param}: token id {token} is not in the model's vocabulary (0 to {vocab - 1})"
            raise bad_request(message, param, "invalid_value")


def _no_token_ids(field: str) -> ApiError:
    return bad_request(f"{field}: a list of token ids is needed; token ids are integers", field, "invalid_type")


def _too_many_stops() -> ApiError:
    limits = f"at most {MAX_STOP_STRINGS} stop strings of {MAX_STOP_CHARACTERS} characters in all are accepted"
    return bad_request(f"stop: {limits}; send fewer", "stop", "invalid_value")


def _refuse(name: str, value: msgspec.Raw) -> None:
    if not REFUSED[name].accepts(value):
        raise unsupported(name, f"{name}: {REFUSED[name].reason}")


def _decode_prompts(data: msgspec.Raw, type_: Any) -> Any:
    try:
        return decode_field(data, type_, "prompt")
    except ApiError as error:
        message = f"{error.message}; a list holds either texts, or token ids, or lists of token ids"
        raise bad_request(message, error.param, error.code) from error


def _check_prompts(count: int) -> None:
    if count > MAX_CHOICES:
        message = f"prompt: {count} prompts are more than {MAX_CHOICES} in one request; send several requests"
        raise bad_request(message, "prompt", "invalid_value")


def _check_ids(count: int, context_tokens: int) -> None:
    if count >= context_tokens:
        raise context_exceeded(context_tokens, count, 1, "prompt")


def _check_range(name: str, value: float | None, allowed: Range) -> None:
    problem = range_error(value, allowed)
    if problem is not None:
        raise bad_request(f"{name}: {problem}", name, "invalid_value")
