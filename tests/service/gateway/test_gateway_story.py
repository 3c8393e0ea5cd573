"""GET /admin/story merges what every process knows of one request or adapter."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from loraserve.bus.protocol import Bus, Envelope
from loraserve.messages import StoryLine, StoryTold, TellStory

Start = Callable[..., AbstractAsyncContextManager[Any]]
HI = {"model": "pirate", "messages": [{"role": "user", "content": "hi"}]}
LONG_AGO_S, FAR_AHEAD_S = 1.0, 4e9


def tell(cluster: Any, **texts: tuple[float, str]) -> list[TellStory]:
    """Make the named processes answer TellStory with one line. Returns the list that collects their requests."""
    asked: list[TellStory] = []
    answer = cluster.answer

    def answer_stories(name: str, bus: Bus, envelope: Envelope) -> None:
        if not isinstance(envelope.message, TellStory):
            answer(name, bus, envelope)
            return
        asked.append(envelope.message)
        known = texts.get(name.replace("-", "_"))
        lines = [StoryLine(unix_s=known[0], subject=envelope.message.subjects[0], text=known[1])] if known else []
        bus.respond(envelope, StoryTold(lines=tuple(lines)))

    cluster.answer = answer_stories
    return asked


def test_a_request_is_found_by_its_answer_and_by_its_http_id(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            asked = tell(gateway.cluster, router=(LONG_AGO_S, "sent to engine-0"), engine_0=(FAR_AHEAD_S, "finished"))
            async with gateway.http.post(
                f"{gateway.url}/v1/chat/completions", json={**HI, "n": 2}, headers={"x-request-id": "mine"}
            ) as response:
                id_ = (await response.json())["id"]
            for known in (id_, "mine"):
                status, story = await gateway.get(f"/admin/story/{known}")
                assert status == 200
                assert {f"{id_}-0", f"{id_}-1"} <= set(story["subjects"])
                assert set(asked[-1].subjects) == set(story["subjects"])
                processes = [entry["process"] for entry in story["entries"]]
                assert (processes[0], processes[-1]) == ("router", "engine-0"), "entries are ordered by time"
                own = [
                    entry["text"]
                    for entry in story["entries"]
                    if (entry["process"], entry["subject"]) == ("gateway-0", f"{id_}-1")
                ]
                assert own[0] == "received as HTTP request mine"
                assert any(text.startswith("accepted by engine-0") for text in own)
                assert any(text.startswith("finished: stop") for text in own)
                assert own[-1] == "HTTP request ended: ok"
                assert story["silent"] == []

    asyncio.run(scenario())


def test_an_adapter_is_found_by_its_name_and_by_its_version(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            gateway.cluster.add_adapter("fresh", "ab" * 32)
            await gateway.get("/v1/models/fresh")
            tell(gateway.cluster, store=(LONG_AGO_S, "registered"))
            for known in ("fresh", "ab" * 32, "ab" * 6):
                _, story = await gateway.get(f"/admin/story/{known}")
                assert {"fresh", "ab" * 32} <= set(story["subjects"])
                assert [(entry["process"], entry["text"]) for entry in story["entries"]] == [("store", "registered")]

    asyncio.run(scenario())


def test_a_process_that_does_not_answer_is_named(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            tell(gateway.cluster)
            gateway.cluster.unreachable.add("planner")
            _, story = await gateway.get("/admin/story/unknown")
            assert story["silent"] == ["planner"]
            assert story["entries"] == []

    asyncio.run(scenario())
