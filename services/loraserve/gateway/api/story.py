"""GET /admin/story/{id}: the events of one request or adapter from all processes, in order of time."""

import asyncio

import msgspec
from aiohttp import web

from loraserve.clock import unix_offset_s
from loraserve.config import engine_names
from loraserve.errors import PeerError, RequestTimeoutError
from loraserve.gateway.context import GATEWAY, Gateway
from loraserve.messages import StoryLine, StoryTold, TellStory

CONTROL = ("store", "planner", "monitor", "router")
TIMEOUT_S = 2.0


async def story(http: web.Request) -> web.Response:
    """Answer with the events of a request id, an adapter name or an adapter version, oldest first.

    ``subjects`` lists the ids that were looked up. ``silent`` lists the processes that did not answer in time.
    """
    gateway, id_ = http.app[GATEWAY], http.match_info["id"]
    subjects = gateway.stories.subjects(id_, gateway.registry.adapters)
    names = [*CONTROL, *engine_names(gateway.config)]
    answers = await asyncio.gather(*(_ask(gateway, name, subjects) for name in names))
    own = gateway.stories.story.told(subjects, unix_offset_s(gateway.clock))
    told = {gateway.bus.name: own, **dict(zip(names, answers, strict=True))}
    entries = [
        {"unix_s": line.unix_s, "process": process, "subject": line.subject, "text": line.text}
        for process, lines in told.items()
        for line in lines or ()
    ]
    body = {
        "id": id_,
        "subjects": subjects,
        "entries": sorted(entries, key=lambda entry: float(str(entry["unix_s"]))),
        "silent": [process for process, lines in told.items() if lines is None],
    }
    return web.Response(body=msgspec.json.encode(body), content_type="application/json")


async def _ask(gateway: Gateway, name: str, subjects: tuple[str, ...]) -> tuple[StoryLine, ...] | None:
    try:
        return (await gateway.bus.request(name, TellStory(subjects=subjects), StoryTold, TIMEOUT_S)).lines
    except (RequestTimeoutError, PeerError):
        return None
