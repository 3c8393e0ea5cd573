"""GET /health: 200 only while a request sent now would find an engine."""

import asyncio
from typing import Any

import msgspec
from aiohttp import web

from loraserve.errors import PeerError, RequestTimeout
from loraserve.gateway.context import GATEWAY, Gateway
from loraserve.messages import Ping, Pong

PING_TIMEOUT_S = 1.0
NEEDED = ("router", "store")


async def health(http: web.Request) -> web.Response:
    gateway = http.app[GATEWAY]
    pongs = await asyncio.gather(*(ping(gateway, name) for name in NEEDED))
    states = {name: pong.state if pong else "UNREACHABLE" for name, pong in zip(NEEDED, pongs, strict=True)}
    engines = gateway.streams.watch.ready_engines(gateway.clock.monotonic_s())
    problems = [f"{name} is {state}" for name, state in states.items() if state != "READY"]
    if not engines:
        problems.append("no engine is alive and READY")
    if gateway.draining:
        problems.append("this gateway is shutting down")
    detail: dict[str, Any] = {"status": "unavailable" if problems else "ok", "engines": engines, **states}
    return web.Response(
        status=503 if problems else 200,
        body=msgspec.json.encode(detail | {"problems": problems}),
        content_type="application/json",
    )


async def live(http: web.Request) -> web.Response:
    """200 while this process answers at all."""
    return web.json_response({"status": "ok", "name": http.app[GATEWAY].bus.name})


async def ping(gateway: Gateway, name: str) -> Pong | None:
    try:
        return await gateway.bus.request(name, Ping(), Pong, PING_TIMEOUT_S)
    except (RequestTimeout, PeerError):
        return None
