"""POST /v1/chat/completions."""

from collections.abc import Sequence
from typing import Any

from aiohttp import web

from loraserve.gateway.api.generate import Choices, Prompting, answer, check_length, plan_call
from loraserve.gateway.api.schema import ChatRequest, check_chat, decode
from loraserve.gateway.context import GATEWAY
from loraserve.gateway.text.detokenize import TokenBytes
from loraserve.gateway.text.output import OutputChunk, ScoredToken
from loraserve.gateway.text.tokenizer import ChatOptions, characters_of, check_template_arguments

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


class ChatFormat:
    id_prefix = "chatcmpl-"
    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def __init__(self, pieces: TokenBytes, logprobs: bool) -> None:
        self._pieces = pieces
        self._logprobs = logprobs
        self._begun: set[int] = set()

    def chunks(self, piece: OutputChunk) -> list[Choices]:
        found = []
        if piece.choice not in self._begun:
            self._begun.add(piece.choice)
            found.append([self._chunk(piece, {"role": "assistant", "content": ""})])
        if piece.text or piece.scored:
            found.append([self._chunk(piece, {"content": piece.text}, scored=piece.scored)])
        if piece.finish is not None:
            found.append([self._chunk(piece, {}, finish=piece.finish) | {"stop_reason": piece.stop_reason}])
        return found

    def whole(self, piece: OutputChunk) -> dict[str, Any]:
        return {
            "index": piece.choice,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self._scores(piece.scored),
            "finish_reason": piece.finish,
            "stop_reason": piece.stop_reason,
        }

    def _chunk(
        self,
        piece: OutputChunk,
        delta: dict[str, Any],
        *,
        scored: Sequence[ScoredToken] = (),
        finish: str | None = None,
    ) -> dict[str, Any]:
        scores = self._scores(scored) if scored else None
        return {"index": piece.choice, "delta": delta, "logprobs": scores, "finish_reason": finish}

    def _scores(self, scored: Sequence[ScoredToken]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        content = [
            self._score(one.token, one.logprob) | {"top_logprobs": [self._score(*top) for top in one.top]}
            for one in scored
        ]
        return {"content": content, "refusal": None}

    def _score(self, token: int, logprob: float) -> dict[str, Any]:
        piece = self._pieces.of(token)
        text = piece.decode("utf-8", "replace")
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(piece)}


async def chat_completions(http: web.Request) -> web.StreamResponse:
    gateway = http.app[GATEWAY]
    request = decode(await http.read(), ChatRequest)
    check_chat(request)
    target = await gateway.resolve(request.model)
    messages = request.messages or []
    characters = characters_of(messages)
    check_length(gateway, characters, "messages")
    gateway.expect(target, characters)
    options = ChatOptions(
        add_generation_prompt=request.add_generation_prompt is not False,
        continue_final_message=bool(request.continue_final_message),
        add_special_tokens=bool(request.add_special_tokens),
        template_arguments=check_template_arguments(request.chat_template_kwargs),
    )
    prompting = Prompting(
        prompts=[await gateway.tokenizer.encode_chat(messages, options)],
        param="messages",
        max_tokens=request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )
    format_ = ChatFormat(gateway.tokenizer.pieces, bool(request.logprobs))
    return await answer(gateway, http, plan_call(gateway, request, target, format_, prompting))
