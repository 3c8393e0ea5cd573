"""What the operators' scripts read and ask for.

GET /admin/cluster and /admin/plan, POST /admin/rebalance, POST /admin/engines/{id}/drain and .../undrain.
"""

import asyncio
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from loraserve.config import engine_names
from loraserve.errors import PeerError, RequestTimeoutError
from loraserve.gateway.api.schema import RebalanceRequest, decode
from loraserve.gateway.context import GATEWAY, Gateway
from loraserve.gateway.errors import ApiError, unavailable
from loraserve.messages import Drain, EngineLoad, GetPlan, Ping, Plan, Pong, Rebalance, RebalanceDone
from loraserve.messages.transfer import Transport
from loraserve.transfer.protocol import choose_transports

T = TypeVar("T")

PLANNER = "planner"
CONTROL = ("store", PLANNER, "monitor", "router")
PLAN_TIMEOUT_S = 1.0
REBALANCE_MARGIN_S = 15.0


async def cluster(http: web.Request) -> web.Response:
    """Everything this gateway knows, and which processes answer now. 200 also while parts are missing."""
    gateway = http.app[GATEWAY]
    names = [*CONTROL, *engine_names(gateway.config)]
    pongs, plan = await asyncio.gather(
        asyncio.gather(*(ping(gateway, name) for name in names)), current_plan_or_none(gateway)
    )
    watch, now = gateway.streams.watch, gateway.clock.monotonic_s()
    alive = [report.load for report in watch.reports.values() if report.alive]
    read_from = reads_from(alive, gateway.config.transfer.transports)
    return reply(
        {
            "gateway": {"name": gateway.bus.name, "streams": len(gateway.streams), "model": gateway.model_name},
            "processes": {name: pong or {"state": "UNREACHABLE"} for name, pong in zip(names, pongs, strict=True)},
            "load_age_s": now - watch.cluster_s if watch.cluster else None,
            "engines": [
                {
                    "name": name,
                    "alive": report.alive,
                    "age_s": now - report.reported_s,
                    "load": report.load,
                    "reads_from": read_from.get(name, {}),
                }
                for name, report in sorted(watch.reports.items())
            ],
            "demand": watch.cluster.demand if watch.cluster else (),
            "plan_epoch": plan.epoch if plan else None,
            "drained": plan.drained if plan else (),
            "registry": {"revision": gateway.registry.revision, "adapters": gateway.registry.adapters},
        }
    )


async def plan(http: web.Request) -> web.Response:
    gateway = http.app[GATEWAY]
    return reply(await ask_planner(gateway, GetPlan(), Plan, PLAN_TIMEOUT_S))


async def rebalance(http: web.Request) -> web.Response:
    gateway = http.app[GATEWAY]
    request = decode(await http.read(), RebalanceRequest)
    timeout_s = gateway.config.planner.prepare_timeout_s + REBALANCE_MARGIN_S
    return reply(await ask_planner(gateway, Rebalance(dry_run=bool(request.dry_run)), RebalanceDone, timeout_s))


async def drain(http: web.Request) -> web.Response:
    """No new requests for the engine, and its copies move elsewhere; answered once they have. Repeating is fine."""
    return await set_drained(http, on=True)


async def undrain(http: web.Request) -> web.Response:
    return await set_drained(http, on=False)


async def set_drained(http: web.Request, on: bool) -> web.Response:
    gateway = http.app[GATEWAY]
    timeout_s = gateway.config.planner.prepare_timeout_s + REBALANCE_MARGIN_S
    return reply(await ask_planner(gateway, Drain(engine=http.match_info["id"], on=on), RebalanceDone, timeout_s))


async def ask_planner(gateway: Gateway, message: Any, answer: type[T], timeout_s: float) -> T:
    try:
        return await gateway.bus.request(PLANNER, message, answer, timeout_s)
    except RequestTimeoutError as error:
        raise unavailable(f"The planner gave no answer ({error}); try again", "no_planner") from error
    except PeerError as error:
        if error.code == "unknown_engine":
            raise ApiError(404, error.message, param="id", code="engine_not_found") from error
        raise ApiError(500, f"The planner refused: {error.message}", type_="server_error", code=error.code) from error


async def current_plan_or_none(gateway: Gateway) -> Plan | None:
    try:
        return await ask_planner(gateway, GetPlan(), Plan, PLAN_TIMEOUT_S)
    except ApiError:
        return None


def reply(value: Any) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")


# MERGED: loraserve.gateway.api.admin
# """GET /health: 200 only while a request sent now would find an engine."""


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
    except (RequestTimeoutError, PeerError):
        return None


# MERGED: loraserve.gateway.api.admin
# """Over which transports engines read adapters from each other, for /admin/cluster. Pure."""


MOST_ENGINES = 64
"""A table of pairs is of no use to anybody beyond, and takes long to make."""


def reads_from(loads: Sequence[EngineLoad], preferred: Sequence[Transport]) -> dict[str, dict[str, list[str]]]:
    """By reader and owner, the transports that carry between the two, first choice first; the store does always."""
    able = {load.engine: load.abilities for load in loads if load.abilities is not None}
    if len(able) > MOST_ENGINES:
        return {}
    return {
        reader: {
            owner: list(choose_transports(mine, theirs, preferred))
            for owner, theirs in sorted(able.items())
            if owner != reader
        }
        for reader, mine in able.items()
    }
