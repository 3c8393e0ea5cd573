"""POST /tokenize and /detokenize, compatible with vLLM."""

import msgspec
from aiohttp import web

from loraserve.gateway.api.chat import encode_messages
from loraserve.gateway.api.limits import check_free_json
from loraserve.gateway.api.schema import (
    DetokenizeRequest,
    TokenizeRequest,
    check_token_ids,
    check_tokenize,
    decode_token_ids,
    read_request,
)
from loraserve.gateway.context import GATEWAY
from loraserve.gateway.text.tokenizer import ModelTokenizer


async def tokenize(http: web.Request) -> web.Response:
    gateway = http.app[GATEWAY]
    request, size = await read_request(http, TokenizeRequest)
    check_tokenize(request)
    if request.model:
        await gateway.resolve(request.model)
    limit = gateway.config.gateway.max_free_json_bytes
    check_free_json(request.messages or [], request.chat_template_kwargs, limit)
    answer = await gateway.tokenizer.run(size, tokenized, gateway.tokenizer, request, gateway.context_tokens())
    return web.Response(body=answer, content_type="application/json")


async def detokenize(http: web.Request) -> web.Response:
    gateway = http.app[GATEWAY]
    request, size = await read_request(http, DetokenizeRequest)
    if request.model:
        await gateway.resolve(request.model)
    answer = await gateway.tokenizer.run(size, detokenized, gateway.tokenizer, request.tokens)
    return web.Response(body=answer, content_type="application/json")


def detokenized(tokenizer: ModelTokenizer, given: msgspec.Raw) -> bytes:
    """Return the JSON answer to /detokenize. Raises ApiError 400 for values that are not ids of the vocabulary."""
    tokens: list[int] = []
    for part in decode_token_ids(given, "tokens"):
        check_token_ids(part, tokenizer.vocab, "tokens")
        tokens += part
    return msgspec.json.encode({"prompt": tokenizer.decode(tokens)})


def tokenized(tokenizer: ModelTokenizer, request: TokenizeRequest, context_tokens: int) -> bytes:
    """Return the JSON answer to a checked /tokenize request. Call it through ``ModelTokenizer.run``."""
    if request.prompt is not None:
        tokens = tokenizer.encode(request.prompt, request.add_special_tokens is not False)
    else:
        tokens = encode_messages(tokenizer, request.messages or [], request, None)
    strings = [tokenizer.token_bytes.text(token) for token in tokens] if request.return_token_strs else None
    return msgspec.json.encode(
        {"count": len(tokens), "max_model_len": context_tokens, "tokens": tokens, "token_strs": strings}
    )
