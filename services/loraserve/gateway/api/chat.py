"""POST /v1/chat/completions: turns messages into a prompt, and output chunks into OpenAI's chat answers."""

from collections.abc import Sequence
from typing import Any

import msgspec
from aiohttp import web

from loraserve.gateway.api.generate import LEAST_LOGPROB, Call, Choices, answer
from loraserve.gateway.api.limits import check_free_json, check_messages, check_text
from loraserve.gateway.api.schema import (
    ChatMessage,
    ChatRequest,
    TokenizeRequest,
    check_chat,
    decode_field,
    read_request,
)
from loraserve.gateway.context import GATEWAY
from loraserve.gateway.errors import bad_request, unsupported
from loraserve.gateway.text.detokenize import TokenBytes
from loraserve.gateway.text.output import OutputChunk, ScoredToken
from loraserve.gateway.text.tokenizer import ModelTokenizer

RESERVED_TEMPLATE_ARGUMENTS = frozenset(
    ("conversation", "messages", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message")
)


async def chat_completions(http: web.Request) -> web.StreamResponse:
    gateway = http.app[GATEWAY]
    request, size = await read_request(http, ChatRequest)
    check_chat(request)
    model = await gateway.resolve(request.model)
    messages = request.messages or []
    tokenizer, context = gateway.tokenizer, gateway.context_tokens()
    check_free_json(messages, request.chat_template_kwargs, gateway.config.gateway.max_free_json_bytes)
    gateway.announce(model, check_messages(tokenizer, messages, context))
    prompt = await tokenizer.run(size, encode_messages, tokenizer, messages, request, context)
    call = Call(
        request=request,
        model=model,
        format=ChatFormat(tokenizer.token_bytes, bool(request.logprobs)),
        prompts=[prompt],
        param="messages",
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )
    return await answer(gateway, http, call)


def encode_messages(
    tokenizer: ModelTokenizer,
    messages: Sequence[ChatMessage],
    request: ChatRequest | TokenizeRequest,
    context: int | None,
) -> tuple[int, ...]:
    """Apply the model's chat template and return the prompt's tokens. Call it through ``ModelTokenizer.run``.

    Raises ApiError 400 if the model has no template, if the template refuses the messages, or if the prompt cannot fit
    into ``context`` tokens (None: no limit).
    """
    if not tokenizer.has_chat_template:
        message = "This model has no chat template; use /v1/completions with a prompt in the model's own format"
        raise bad_request(message, "messages", "no_chat_template")
    conversation = [template_message(message, index) for index, message in enumerate(messages)]
    arguments = template_arguments(request.chat_template_kwargs)
    adds_prompt, continues = request.add_generation_prompt is not False, bool(request.continue_final_message)
    try:
        text = tokenizer.render_chat(conversation, adds_prompt, continues, arguments)
    except Exception as error:
        # A template is code written by the model's author. Any exception means that it refuses these messages.
        reason = f"the model's chat template refuses these messages: {error}"
        raise bad_request(f"messages: {reason}", "messages", "chat_template_error") from error
    if context is not None:
        check_text(tokenizer, len(text), context, "messages")
    return tokenizer.encode(text, bool(request.add_special_tokens))


def template_message(message: ChatMessage, index: int) -> dict[str, Any]:
    """Return the message as a dict for the chat template, with its text parts joined by newlines.

    Raises ApiError 400 for parts that are not text and for a ``prefix`` that is true.
    """
    if bytes(message.prefix) == b"true":
        param = f"messages[{index}].prefix"
        remedy = "to continue the last message, set continue_final_message to true"
        raise unsupported(param, f"{param}: is not supported; {remedy}")
    content = message.content
    if isinstance(content, list):
        for number, part in enumerate(content):
            if part.type not in ("text", "input_text") or part.text is None:
                param = f"messages[{index}].content[{number}]"
                raise unsupported(param, f"{param}: only parts of type text are supported, found {part.type!r}")
        content = "\n".join(part.text or "" for part in content)
    optional = {
        "name": message.name,
        "reasoning_content": message.reasoning_content,
        "tool_calls": decode_field(message.tool_calls, Any, f"messages[{index}].tool_calls"),
        "tool_call_id": message.tool_call_id,
        "function_call": decode_field(message.function_call, Any, f"messages[{index}].function_call"),
    }
    return {"role": message.role, "content": content} | {key: value for key, value in optional.items() if value}


def template_arguments(given: msgspec.Raw) -> dict[str, Any]:
    """Decode ``chat_template_kwargs``. Raises ApiError 400 for reserved names and if it is not an object."""
    arguments: dict[str, Any] = decode_field(given, dict[str, Any] | None, "chat_template_kwargs") or {}
    reserved = sorted(RESERVED_TEMPLATE_ARGUMENTS & set(arguments))
    if reserved:
        message = f"chat_template_kwargs: {', '.join(reserved)} cannot be set here; leave it out"
        raise bad_request(message, "chat_template_kwargs", "invalid_value")
    return arguments


class ChatFormat:
    """Formats output as OpenAI's chat answers, with vLLM's ``stop_reason``."""

    id_prefix = "chatcmpl-"
    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def __init__(self, token_bytes: TokenBytes, logprobs: bool) -> None:
        self._token_bytes = token_bytes
        self._logprobs = logprobs
        self._started: set[int] = set()

    def events(self, chunk: OutputChunk) -> list[Choices]:
        events = []
        if chunk.choice not in self._started:
            self._started.add(chunk.choice)
            events.append([self._delta(chunk, {"role": "assistant", "content": ""})])
        if chunk.text or chunk.scored:
            events.append([self._delta(chunk, {"content": chunk.text}, scored=chunk.scored)])
        if chunk.finish is not None:
            events.append([self._delta(chunk, {}, finish=chunk.finish) | {"stop_reason": chunk.stop_reason}])
        return events

    def whole(self, output: OutputChunk) -> dict[str, Any]:
        return {
            "index": output.choice,
            "message": {"role": "assistant", "content": output.text, "refusal": None},
            "logprobs": self._logprobs_of(output.scored),
            "finish_reason": output.finish,
            "stop_reason": output.stop_reason,
        }

    def _delta(
        self,
        chunk: OutputChunk,
        delta: dict[str, Any],
        *,
        scored: Sequence[ScoredToken] = (),
        finish: str | None = None,
    ) -> dict[str, Any]:
        logprobs = self._logprobs_of(scored) if scored else None
        return {"index": chunk.choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs_of(self, scored: Sequence[ScoredToken]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        content = [
            self._logprob(one.token, one.logprob) | {"top_logprobs": [self._logprob(*top) for top in one.top]}
            for one in scored
        ]
        return {"content": content, "refusal": None}

    def _logprob(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._token_bytes.of(token)
        text = data.decode("utf-8", "replace")
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(data)}
