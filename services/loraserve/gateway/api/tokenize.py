"""POST /tokenize and /detokenize, as vLLM has them."""

from aiohttp import web

from loraserve.gateway.api.completions import check_token_ids
from loraserve.gateway.api.schema import DetokenizeRequest, TokenizeRequest, decode
from loraserve.gateway.context import GATEWAY, Gateway
from loraserve.gateway.errors import bad_request
from loraserve.gateway.text.tokenizer import ChatOptions, check_template_arguments


async def tokenize(http: web.Request) -> web.Response:
    gateway = http.app[GATEWAY]
    request = decode(await http.read(), TokenizeRequest)
    if request.model:
        await gateway.resolve(request.model)
    tokens = await tokens_of(gateway, request)
    answer = {"count": len(tokens), "max_model_len": gateway.context_tokens(), "tokens": tokens}
    strings = [gateway.tokenizer.pieces.text(token) for token in tokens] if request.return_token_strs else None
    return web.json_response(answer | {"token_strs": strings})


async def detokenize(http: web.Request) -> web.Response:
    gateway = http.app[GATEWAY]
    request = decode(await http.read(), DetokenizeRequest)
    if request.model:
        await gateway.resolve(request.model)
    check_token_ids(request.tokens, gateway.tokenizer.vocab, "tokens")
    return web.json_response({"prompt": gateway.tokenizer.decode(request.tokens)})


async def tokens_of(gateway: Gateway, request: TokenizeRequest) -> list[int]:
    if request.prompt is not None and request.messages is None:
        return await gateway.tokenizer.encode(request.prompt, request.add_special_tokens is not False)
    if request.messages and request.prompt is None:
        options = ChatOptions(
            add_generation_prompt=request.add_generation_prompt is not False,
            continue_final_message=bool(request.continue_final_message),
            add_special_tokens=bool(request.add_special_tokens),
            template_arguments=check_template_arguments(request.chat_template_kwargs),
        )
        return await gateway.tokenizer.encode_chat(request.messages, options)
    raise bad_request("prompt: give either prompt or messages", "prompt", "missing_required_parameter")
