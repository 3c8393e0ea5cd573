"""POST /v1/completions."""

from collections.abc import Sequence
from typing import Any

from aiohttp import web

from loraserve.gateway.api.chat import LEAST_LOGPROB
from loraserve.gateway.api.generate import Choices, Prompting, answer, check_count, check_length, plan_call
from loraserve.gateway.api.schema import MAX_CHOICES, CompletionRequest, check_completion, decode
from loraserve.gateway.context import GATEWAY, Gateway
from loraserve.gateway.errors import bad_request
from loraserve.gateway.text.detokenize import TokenBytes
from loraserve.gateway.text.output import OutputChunk, ScoredToken


class CompletionFormat:
    """``echoes`` has, per choice, the prompt's text to put in front of it; empty for none."""

    id_prefix = "cmpl-"
    chunk_object = "text_completion"
    whole_object = "text_completion"

    def __init__(self, pieces: TokenBytes, logprobs: bool, echoes: Sequence[str]) -> None:
        self._pieces = pieces
        self._logprobs = logprobs
        self._echoes = dict(enumerate(echoes))
        self._offsets: dict[int, int] = {}

    def chunks(self, piece: OutputChunk) -> list[Choices]:
        return [[self.whole(piece)]]

    def whole(self, piece: OutputChunk) -> dict[str, Any]:
        return {
            "index": piece.choice,
            "text": self._echoes.pop(piece.choice, "") + piece.text,
            "logprobs": self._scores(piece) if self._logprobs else None,
            "finish_reason": piece.finish,
            "stop_reason": piece.stop_reason,
        }

    def _scores(self, piece: OutputChunk) -> dict[str, Any]:
        """Four lists with an entry a token; offsets go on from the choice's last piece."""
        tokens = [self._pieces.text(one.token) for one in piece.scored]
        offset = self._offsets.get(piece.choice, 0)
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        self._offsets[piece.choice] = offset
        return {
            "tokens": tokens,
            "token_logprobs": [max(one.logprob, LEAST_LOGPROB) for one in piece.scored],
            "top_logprobs": [self._top(one) for one in piece.scored],
            "text_offset": offsets,
        }

    def _top(self, one: ScoredToken) -> dict[str, float]:
        likely = ((one.token, one.logprob), *one.top)
        return {self._pieces.text(token): max(logprob, LEAST_LOGPROB) for token, logprob in likely}


async def completions(http: web.Request) -> web.StreamResponse:
    gateway = http.app[GATEWAY]
    request = decode(await http.read(), CompletionRequest)
    check_completion(request)
    target = await gateway.resolve(request.model)
    if isinstance(request.prompt, list) and request.prompt and isinstance(request.prompt[0], int):
        check_count(gateway, len(request.prompt), "prompt")
    texts = prompt_items(request.prompt)
    characters = longest_text(texts)
    check_length(gateway, characters, "prompt")
    gateway.expect(target, characters)
    prompts = [await prompt_tokens(gateway, item, request.add_special_tokens is not False) for item in texts]
    prompting = Prompting(prompts=prompts, param="prompt", max_tokens=request.max_tokens, logprobs=request.logprobs)
    format_ = CompletionFormat(gateway.tokenizer.pieces, request.logprobs is not None, echoes(gateway, request, texts))
    return await answer(gateway, http, plan_call(gateway, request, target, format_, prompting))


def prompt_items(prompt: str | list[int | str | list[int]] | None) -> list[str | list[int]]:
    """The prompts of all four shapes of the field. Raises ApiError 400 for mixtures, none and too many."""
    if prompt is None or prompt == []:
        raise bad_request("prompt: a text, token ids or a list of either is needed", "prompt", "invalid_value")
    if isinstance(prompt, str):
        return [prompt]
    if len(prompt) > MAX_CHOICES and not isinstance(prompt[0], int):
        message = f"prompt: {len(prompt)} prompts are more than {MAX_CHOICES} in one request"
        raise bad_request(message, "prompt", "invalid_value")
    if all(isinstance(item, int) for item in prompt):
        return [[item for item in prompt if isinstance(item, int)]]
    if not all(isinstance(item, type(prompt[0])) for item in prompt):
        message = "prompt: a list holds either texts, or token ids, or lists of token ids"
        raise bad_request(message, "prompt", "invalid_type")
    return [item for item in prompt if not isinstance(item, int)]


def longest_text(items: Sequence[str | list[int]]) -> int:
    """Characters that have to become tokens before the first request can be sent: of the longest of them."""
    return max((len(item) for item in items if isinstance(item, str)), default=0)


async def prompt_tokens(gateway: Gateway, item: str | list[int], add_special_tokens: bool) -> list[int]:
    if isinstance(item, str):
        check_length(gateway, len(item), "prompt")
        return await gateway.tokenizer.encode(item, add_special_tokens)
    check_count(gateway, len(item), "prompt")
    check_token_ids(item, gateway.tokenizer.vocab, "prompt")
    return item


def check_token_ids(tokens: Sequence[int], vocab: int, param: str) -> None:
    """Raises ApiError 400 for ids that the model has no row for."""
    wrong = next((token for token in tokens if not 0 <= token < vocab), None)
    if wrong is not None:
        message = f"{param}: token id {wrong} is not in the model's vocabulary (0 to {vocab - 1})"
        raise bad_request(message, param, "invalid_value")


def echoes(gateway: Gateway, request: CompletionRequest, items: Sequence[str | list[int]]) -> list[str]:
    if not request.echo:
        return []
    texts = [item if isinstance(item, str) else gateway.tokenizer.decode(item) for item in items]
    return [text for text in texts for _ in range(request.n or 1)]
