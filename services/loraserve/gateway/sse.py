"""Server-sent events, as OpenAI's clients read them."""

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from aiohttp import web

from loraserve.gateway.errors import ApiError

DONE = b"data: [DONE]\n\n"
LAST_WORDS_S = 1.0

_encoder = msgspec.json.Encoder()


def events(payloads: Iterable[Mapping[str, Any]]) -> bytes:
    """One event a payload, to be written together."""
    return b"".join([b"data: " + _encoder.encode(payload) + b"\n\n" for payload in payloads])


async def open_stream(request: web.Request, headers: Mapping[str, str]) -> web.StreamResponse:
    """Status and headers go out; what fails from now on is told by an event."""
    response = web.StreamResponse(headers=headers)
    response.content_type = "text/event-stream"
    response.charset = "utf-8"
    response.headers["Cache-Control"] = "no-cache"
    response.headers["X-Accel-Buffering"] = "no"
    await response.prepare(request)
    return response


async def fail_stream(request: web.Request, response: web.StreamResponse, error: ApiError) -> None:
    """The error as the last event; a client that does not read even that is cut off."""
    try:
        async with asyncio.timeout(LAST_WORDS_S):
            await response.write(events([error.body]) + DONE)
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
