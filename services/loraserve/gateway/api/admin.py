"""Endpoints for operators and health probes.

GET /admin/cluster, /admin/plan and /admin/story/{id}, POST /admin/rebalance, POST /admin/engines/{id}/drain and
/undrain, GET /health and /live.
"""

import asyncio
from collections.abc import Sequence
from operator import itemgetter
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from loraserve.clock import unix_offset_s
from loraserve.config import engine_names
from loraserve.errors import PeerError, RequestTimeoutError
from loraserve.gateway.api.schema import RebalanceRequest, read_request
from loraserve.gateway.context import GATEWAY, Gateway
from loraserve.gateway.errors import SERVER, ApiError, unavailable
from loraserve.gateway.siblings import ask_or_none, ask_siblings, sibling_names
from loraserve.messages import (
    Drain,
    EngineCapabilities,
    EngineCounters,
    GetPlan,
    Ping,
    Plan,
    Pong,
    Rebalance,
    RebalanceDone,
    StoryTold,
    TellStory,
)
from loraserve.messages.transfer import Transport
from loraserve.transfer.protocol import choose_transports

T = TypeVar("T")

PLANNER = "planner"
CONTROL = ("store", PLANNER, "monitor", "router")
NEEDED_FOR_HEALTH = ("router", "store")
PLAN_TIMEOUT_S = 1.0
PING_TIMEOUT_S = 1.0
STORY_TIMEOUT_S = 2.0
REBALANCE_MARGIN_S = 15.0

MAX_TABLE_ENGINES = 64
"""With more engines, the table of all engine pairs would be slow to compute and too large to read."""


async def show_cluster(http: web.Request) -> web.Response:
    """Answer with the cluster state known to this gateway. The status is 200 even if some processes do not respond."""
    gateway = http.app[GATEWAY]
    names = [*CONTROL, *engine_names(gateway.config), *sibling_names(gateway)]
    pongs, plan = await asyncio.gather(ping_all(gateway, names), current_plan_or_none(gateway))
    watch, now = gateway.streams.watch, gateway.clock.monotonic_s()
    alive = [report.capabilities for report in watch.reports.values() if report.alive]
    transports = usable_transports(alive, gateway.config.transfer.transports)
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
                    "capabilities": report.capabilities,
                    "counters": watch.counters.get(name, EngineCounters()),
                    "reads_from": transports.get(name, {}),
                }
                for name, report in sorted(watch.reports.items())
            ],
            "demand": watch.cluster.demand if watch.cluster else (),
            "plan_epoch": plan.epoch if plan else None,
            "drained": plan.drained if plan else (),
            "registry": {"revision": gateway.registry.revision, "adapters": gateway.registry.adapters},
        }
    )


def usable_transports(
    engines: Sequence[EngineCapabilities], preferred: Sequence[Transport]
) -> dict[str, dict[str, list[str]]]:
    """Return {reader: {owner: transports}} for all pairs of engines, with the best transport first.

    The store is left out, since every engine can read from it. Empty above ``MAX_TABLE_ENGINES`` engines.
    """
    able = {engine.engine: engine.abilities for engine in engines if engine.abilities is not None}
    if len(able) > MAX_TABLE_ENGINES:
        return {}
    return {
        reader: {
            owner: list(choose_transports(own, others, preferred))
            for owner, others in sorted(able.items())
            if owner != reader
        }
        for reader, own in able.items()
    }


async def show_plan(http: web.Request) -> web.Response:
    return reply(await ask_planner(http.app[GATEWAY], GetPlan(), Plan, PLAN_TIMEOUT_S))


async def rebalance(http: web.Request) -> web.Response:
    gateway = http.app[GATEWAY]
    request, _ = await read_request(http, RebalanceRequest)
    return reply(await change_plan(gateway, Rebalance(dry_run=bool(request.dry_run))))


async def drain_engine(http: web.Request) -> web.Response:
    """Stop routing requests to an engine, move its adapters to others, then answer. The call can be repeated."""
    return reply(await change_plan(http.app[GATEWAY], Drain(engine=http.match_info["id"], on=True)))


async def undrain_engine(http: web.Request) -> web.Response:
    return reply(await change_plan(http.app[GATEWAY], Drain(engine=http.match_info["id"], on=False)))


async def change_plan(gateway: Gateway, message: Rebalance | Drain) -> RebalanceDone:
    timeout_s = gateway.config.planner.prepare_timeout_s + REBALANCE_MARGIN_S
    return await ask_planner(gateway, message, RebalanceDone, timeout_s)


async def ask_planner(gateway: Gateway, message: Any, answer: type[T], timeout_s: float) -> T:
    try:
        return await gateway.bus.request(PLANNER, message, answer, timeout_s)
    except RequestTimeoutError as error:
        raise unavailable(f"The planner did not answer ({error}); try again", "no_planner") from error
    except PeerError as error:
        if error.code == "unknown_engine":
            raise ApiError(404, error.message, param="id", code="engine_not_found") from error
        raise ApiError(500, f"The planner refused: {error.message}", type_=SERVER, code=error.code) from error


async def current_plan_or_none(gateway: Gateway) -> Plan | None:
    try:
        return await ask_planner(gateway, GetPlan(), Plan, PLAN_TIMEOUT_S)
    except ApiError:
        return None


async def show_health(http: web.Request) -> web.Response:
    """Answer 200 if a request sent now would reach an engine, else 503 with a list of problems."""
    gateway = http.app[GATEWAY]
    pongs = await ping_all(gateway, NEEDED_FOR_HEALTH)
    states = {name: pong.state if pong else "UNREACHABLE" for name, pong in zip(NEEDED_FOR_HEALTH, pongs, strict=True)}
    engines = gateway.streams.watch.ready_engines(gateway.clock.monotonic_s())
    problems = [f"{name} is {state}" for name, state in states.items() if state != "READY"]
    if not engines:
        problems.append("no engine is alive and READY")
    if gateway.connections.is_draining:
        problems.append("this gateway is shutting down")
    status = "unavailable" if problems else "ok"
    return reply({"status": status, "engines": engines, **states, "problems": problems}, 503 if problems else 200)


async def show_live(http: web.Request) -> web.Response:
    """Answer 200 while this process runs, even if the cluster is unavailable."""
    return web.json_response({"status": "ok", "name": http.app[GATEWAY].bus.name})


async def show_story(http: web.Request) -> web.Response:
    """Answer with the events of a request id, an adapter name or an adapter version, oldest first.

    ``subjects`` lists the ids that were looked up. ``silent`` lists the processes that did not answer in time.
    """
    gateway, id_ = http.app[GATEWAY], http.match_info["id"]
    siblings = await ask_siblings(gateway, TellStory(subjects=(id_,)), StoryTold, STORY_TIMEOUT_S)
    subjects = gateway.stories.subjects(id_, gateway.registry.adapters)
    # Only the gateway that received a request knows its ids on other processes.
    found = (line.subject for answer in siblings.values() if answer for line in answer.lines)
    subjects = tuple(dict.fromkeys((*subjects, *found)))
    names = [*CONTROL, *engine_names(gateway.config)]
    message = TellStory(subjects=subjects)
    answers = await asyncio.gather(*(ask_or_none(gateway, name, message, StoryTold, STORY_TIMEOUT_S) for name in names))
    own = StoryTold(lines=gateway.stories.story.told(subjects, unix_offset_s(gateway.clock)))
    told = {gateway.bus.name: own, **siblings, **dict(zip(names, answers, strict=True))}
    entries = [
        (line.unix_s, {"unix_s": line.unix_s, "process": process, "subject": line.subject, "text": line.text})
        for process, answer in told.items()
        for line in (answer.lines if answer else ())
    ]
    return reply(
        {
            "id": id_,
            "subjects": subjects,
            "entries": [entry for _, entry in sorted(entries, key=itemgetter(0))],
            "silent": [process for process, answer in told.items() if answer is None],
        }
    )


async def ping_all(gateway: Gateway, names: Sequence[str]) -> list[Pong | None]:
    return await asyncio.gather(*(ask_or_none(gateway, name, Ping(), Pong, PING_TIMEOUT_S) for name in names))


def reply(value: Any, status: int = 200) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(value), content_type="application/json")
