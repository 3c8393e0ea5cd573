"""POST /v1/completions: turns prompts into tokens, and output chunks into OpenAI's completion answers."""

from collections.abc import Sequence
from typing import Any

from aiohttp import web

from loraserve.gateway.api.generate import LEAST_LOGPROB, Call, Choices, answer
from loraserve.gateway.api.limits import check_choices, check_text
from loraserve.gateway.api.schema import (
    CompletionRequest,
    check_completion,
    check_token_ids,
    prompt_items,
    read_request,
)
from loraserve.gateway.context import GATEWAY, Gateway
from loraserve.gateway.text.detokenize import TokenBytes
from loraserve.gateway.text.output import OutputChunk, ScoredToken
from loraserve.gateway.text.tokenizer import ModelTokenizer


async def completions(http: web.Request) -> web.StreamResponse:
    gateway = http.app[GATEWAY]
    request, size = await read_request(http, CompletionRequest)
    check_completion(request)
    model = await gateway.resolve(request.model)
    items = prompt_items(request.prompt, gateway.context_tokens())
    check_choices(request.n, len(items))
    gateway.announce(model, check_items(gateway, items))
    special = request.add_special_tokens is not False
    prompts = await gateway.tokenizer.run(size, encode_items, gateway.tokenizer, items, special)
    echoes: list[str] = []
    if request.echo:
        echoes = await gateway.tokenizer.run(size, echoed, gateway.tokenizer, items, request.n or 1)
    call = Call(
        request=request,
        model=model,
        format=CompletionFormat(gateway.tokenizer.token_bytes, request.logprobs is not None, echoes),
        prompts=prompts,
        param="prompt",
        logprobs=request.logprobs,
    )
    return await answer(gateway, http, call)


def check_items(gateway: Gateway, items: Sequence[str | list[int]]) -> int:
    """Return the length of the longest text in characters. Raises ApiError 400 for too long texts and unknown ids."""
    for item in items:
        if not isinstance(item, str):
            check_token_ids(item, gateway.tokenizer.vocab, "prompt")
    characters = max((len(item) for item in items if isinstance(item, str)), default=0)
    check_text(gateway.tokenizer, characters, gateway.context_tokens(), "prompt")
    return characters


def encode_items(
    tokenizer: ModelTokenizer, items: Sequence[str | list[int]], add_special_tokens: bool
) -> list[tuple[int, ...]]:
    """Return the tokens of each prompt. Call it through ``ModelTokenizer.run``."""
    return [tokenizer.encode(item, add_special_tokens) if isinstance(item, str) else tuple(item) for item in items]


def echoed(tokenizer: ModelTokenizer, items: Sequence[str | list[int]], n: int) -> list[str]:
    """Return the prompt text of each choice, with ``n`` choices per prompt. Call it through ``ModelTokenizer.run``."""
    texts = [item if isinstance(item, str) else tokenizer.decode(item) for item in items]
    return [text for text in texts for _ in range(n)]


class CompletionFormat:
    """Formats output as OpenAI's completion answers. ``echoes`` holds each choice's prompt; empty without ``echo``."""

    id_prefix = "cmpl-"
    chunk_object = "text_completion"
    whole_object = "text_completion"

    def __init__(self, token_bytes: TokenBytes, logprobs: bool, echoes: Sequence[str]) -> None:
        self._token_bytes = token_bytes
        self._logprobs = logprobs
        self._echoes = dict(enumerate(echoes))
        self._offsets: dict[int, int] = {}

    def events(self, chunk: OutputChunk) -> list[Choices]:
        return [[self.whole(chunk)]]

    def whole(self, output: OutputChunk) -> dict[str, Any]:
        return {
            "index": output.choice,
            "text": self._echoes.pop(output.choice, "") + output.text,
            "logprobs": self._logprobs_of(output) if self._logprobs else None,
            "finish_reason": output.finish,
            "stop_reason": output.stop_reason,
        }

    def _logprobs_of(self, output: OutputChunk) -> dict[str, Any]:
        """Return OpenAI's ``logprobs`` object. Text offsets continue from the choice's previous chunk."""
        tokens = [self._token_bytes.text(one.token) for one in output.scored]
        offset = self._offsets.get(output.choice, 0)
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        self._offsets[output.choice] = offset
        return {
            "tokens": tokens,
            "token_logprobs": [max(one.logprob, LEAST_LOGPROB) for one in output.scored],
            "top_logprobs": [self._top(one) for one in output.scored],
            "text_offset": offsets,
        }

    def _top(self, scored: ScoredToken) -> dict[str, float]:
        likely = ((scored.token, scored.logprob), *scored.top)
        return {self._token_bytes.text(token): max(logprob, LEAST_LOGPROB) for token, logprob in likely}
