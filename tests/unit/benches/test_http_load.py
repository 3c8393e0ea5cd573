"""The load generator against a small server that answers in OpenAI's form, at a known pace."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web
from harness.http_load import load
from harness.report import BenchError

PACE_S = 0.02
WAIT_S = 0.06


async def stream(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    await asyncio.sleep(WAIT_S)
    tokens = body["max_tokens"] - body.get("short_by", 0)
    for _ in range(tokens):
        await response.write(event({"choices": [{"text": " word"}]}))
        await asyncio.sleep(PACE_S)
    if body.get("break"):
        await response.write(event({"error": {"message": "engine died"}}))
    await response.write(event({"choices": [], "usage": {"completion_tokens": tokens}}))
    await response.write(b"data: [DONE]\n\n")
    return response


async def refuse(request: web.Request) -> web.Response:
    return web.json_response({"error": {"message": "no such model"}}, status=404)


def event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content)}\n\n".encode()


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def measured(handler: Handler, bodies: list[dict[str, Any]], tokens: int = 10) -> Any:
    async def run() -> Any:
        app = web.Application()
        app.router.add_post("/v1/completions", handler)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            port = runner.addresses[0][1]
            return await load(f"http://127.0.0.1:{port}", bodies, 1, tokens)
        finally:
            await runner.cleanup()

    return asyncio.run(run())


def test_streams_run_together_and_are_timed() -> None:
    result = measured(stream, [{"model": "a"}] * 4)
    # Times can only be longer than the server's pace, so these bounds hold on a slow machine as well.
    assert result.ttft_s >= WAIT_S
    assert result.decode_tok_s <= 1 / PACE_S
    assert result.tok_s <= 4 * 10 / (WAIT_S + 10 * PACE_S)
    # Sequential streams would exceed this bound.
    assert result.tok_s > 10 / (WAIT_S + 10 * PACE_S)


def test_too_few_tokens_are_an_error() -> None:
    with pytest.raises(BenchError, match="returned 7 tokens"):
        measured(stream, [{"short_by": 3}])


def test_a_broken_stream_is_an_error() -> None:
    with pytest.raises(BenchError, match="engine died"):
        measured(stream, [{"break": True}])


def test_a_refusal_is_an_error() -> None:
    with pytest.raises(BenchError, match=r"answered 404: .*no such model"):
        measured(refuse, [{}])
