"""What clients receive when something fails, and what engines are told when clients leave."""

import asyncio
import dataclasses
import json
import socket
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import openai
import pytest

from loraserve.errors import ConfigError
from loraserve.gateway.streams import RECENT_TOKENS_S
from loraserve.messages import EngineGone, Rejected, ToEngine, ToRouter

Start = Callable[..., AbstractAsyncContextManager[Any]]
LONG = "one two three four five six"
HI = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": HI} | fields


def test_rejections_of_the_router_become_http_errors(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            cases = {"overloaded": openai.RateLimitError, "no_engine": openai.InternalServerError}
            for code, error in (cases | {"bad_request": openai.BadRequestError}).items():
                gateway.cluster.reject = Rejected(request_id="", code=code, message="so it is", retry_after_s=2.5)
                for stream in (False, True):
                    with pytest.raises(error) as caught:
                        await gateway.openai.chat.completions.create(model="tiny", messages=HI, stream=stream)
                    assert caught.value.code == code
                    assert "so it is" in caught.value.message
                    assert (caught.value.response.headers.get("Retry-After") == "3") == (code in cases)

    asyncio.run(scenario())


def test_a_request_waits_for_the_router_until_its_own_deadline(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway("gateway.route_timeout_s=0.1", "gateway.request_timeout_s=1.0") as gateway:
            gateway.cluster.route_silent = True
            status, body = await gateway.post("/v1/chat/completions", chat())
            assert (status, body["error"]["code"]) == (503, "router_unavailable")
            assert len(gateway.cluster.routes) > 2, "it asked again"
            assert len({route.request_id for route in gateway.cluster.routes}) == 1
            call = asyncio.create_task(gateway.post("/v1/chat/completions", chat()))
            await asyncio.sleep(0.3)
            gateway.cluster.route_silent = False
            assert (await call)[0] == 200

    asyncio.run(scenario())


def test_a_length_refused_by_the_router_names_the_prompt_s_field(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            gateway.cluster.reject = Rejected(request_id="", code="context_length", message="too long")
            bodies = {"messages": chat(), "prompt": {"model": "tiny", "prompt": "hi"}}
            for param, path in (("messages", "/v1/chat/completions"), ("prompt", "/v1/completions")):
                status, body = await gateway.post(path, bodies[param])
                error = body["error"]
                assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", param)

    asyncio.run(scenario())


def test_a_router_that_dies_is_asked_once_more(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            cluster = gateway.cluster
            cluster.route_silent = True
            call = asyncio.create_task(gateway.post("/v1/chat/completions", chat()))
            await gateway.until(lambda: cluster.routes, "the router to be asked")
            cluster.network.kill("router")
            cluster.route_silent = False
            cluster.start_one("router", ToRouter)
            assert (await call)[0] == 200
            assert [route.request_id for route in cluster.routes] == [cluster.routes[0].request_id] * 2

    asyncio.run(scenario())


def test_a_router_that_is_starting_is_asked_again(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            cluster = gateway.cluster
            cluster.network.kill("router")
            bus = cluster.network.bus("router", ToRouter)
            asked = asyncio.create_task(gateway.post("/v1/completions", {"model": "tiny", "prompt": "x"}))
            for _ in range(2):
                bus.refuse(await bus.receive(), "starting", "router is starting; ask again")
            cluster.network.kill("router")
            cluster.start_one("router", ToRouter)
            assert (await asked)[0] == 200

    asyncio.run(scenario())


def test_a_router_that_dies_twice_is_asked_a_third_time(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            cluster = gateway.cluster
            cluster.route_silent = True
            call = asyncio.create_task(gateway.post("/v1/chat/completions", chat()))
            for asked in (1, 2):
                await gateway.until(lambda asked=asked: len(cluster.routes) == asked, "the router to be asked")
                cluster.route_silent = asked == 1
                cluster.network.kill("router")
                cluster.start_one("router", ToRouter)
            assert (await call)[0] == 200

    asyncio.run(scenario())


def test_a_rejected_choice_aborts_the_others(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway("gateway.request_timeout_s=0.5") as gateway:
            reply = gateway.cluster.replies[""]
            reply.pause_at = 0
            original = gateway.cluster.route

            async def second_is_lost(bus: Any, envelope: Any, route: Any) -> None:
                if not route.request_id.endswith("-1"):
                    await original(bus, envelope, route)

            gateway.cluster.route = second_is_lost
            status, _ = await gateway.post("/v1/chat/completions", chat(n=2))
            assert status == 503
            await gateway.until(lambda: gateway.cluster.aborts, "the first choice to be aborted")
            assert gateway.cluster.aborts[0][1].endswith("-0")

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("pause_at", [0, 3])
def test_a_client_that_leaves_aborts_its_request(start_gateway: Start, stream: bool, pause_at: int) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            gateway.cluster.replies[""].text, gateway.cluster.replies[""].pause_at = LONG, pause_at
            call = asyncio.create_task(gateway.post("/v1/chat/completions", chat(stream=stream)))
            await gateway.until(lambda: gateway.cluster.playing, "the request to run")
            await asyncio.sleep(0.05)
            assert len(gateway.service.gateway.streams) == 1
            call.cancel()
            await gateway.until(lambda: gateway.cluster.aborts, "the engine to be told")
            assert gateway.cluster.aborts == [("engine-0", gateway.cluster.routes[-1].request_id)]

    asyncio.run(scenario())


def test_a_client_that_leaves_during_routing_aborts_its_request(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            gateway.cluster.route_delay_s = 0.2
            gateway.cluster.replies[""].pause_at = 0
            call = asyncio.create_task(gateway.post("/v1/chat/completions", chat()))
            await gateway.until(lambda: gateway.cluster.routes, "the router to be asked")
            call.cancel()
            await gateway.until(lambda: gateway.cluster.aborts, "the engine to be told")
            assert gateway.cluster.aborts == [("engine-0", gateway.cluster.routes[-1].request_id)]

    asyncio.run(scenario())


def test_the_router_is_not_asked_again_for_a_client_that_has_left(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway("gateway.route_timeout_s=0.1") as gateway:
            gateway.cluster.route_silent = True
            call = asyncio.create_task(gateway.post("/v1/chat/completions", chat()))
            await gateway.until(lambda: len(gateway.cluster.routes) == 2, "the router to be asked again")
            call.cancel()
            await gateway.until(lambda: not len(gateway.service.gateway.streams), "the gateway to notice")
            asked = len(gateway.cluster.routes)
            await asyncio.sleep(0.6)
            assert len(gateway.cluster.routes) == asked

    asyncio.run(scenario())


def text_of(events: list[Any]) -> str:
    """Return the text of a streamed answer with one choice."""
    assert events[-1] == "[DONE]"
    return "".join(event["choices"][0]["delta"].get("content") or "" for event in events[:-1])


@pytest.mark.parametrize(
    "end", ["it stopped reporting", "its process ended", "it was restarted", "it does not answer this gateway"]
)
def test_the_requests_of_a_dead_engine_continue_on_another(start_gateway: Start, end: str) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            cluster = gateway.cluster
            reply = cluster.replies[""]
            reply.text, reply.pause_at, reply.cached_tokens = LONG, 3, 1
            streamed = asyncio.create_task(gateway.events("/v1/chat/completions", chat(stream=True)))
            whole = asyncio.create_task(gateway.post("/v1/chat/completions", chat(logprobs=True)))
            await gateway.until(lambda: len(cluster.playing) == 2, "both to run")
            await asyncio.sleep(0.05)
            if end == "it stopped reporting":
                cluster.dead.add("engine-0")
            elif end == "its process ended":
                gone = EngineGone(engine="engine-0", incarnation=cluster.incarnations["engine-0"], ended=True)
                cluster.buses["monitor"].publish("gone", gone)
            elif end == "it does not answer this gateway":
                cluster.unreachable.add("engine-0")
            else:
                cluster.incarnations["engine-0"] = "new" * 5
            reply.pause_at = None
            events = await streamed
            assert text_of(events) == LONG
            assert events[-2]["choices"][0]["finish_reason"] == "stop"
            status, body = await whole
            assert status == 200
            choice, tokens = body["choices"][0], len(cluster.encode(LONG)) + 1
            assert (choice["message"]["content"], choice["finish_reason"]) == (LONG, "stop")
            assert len(choice["logprobs"]["content"]) == body["usage"]["completion_tokens"] == tokens
            assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 1
            later = [route for route in cluster.routes if route.generated]
            assert [(route.generated, route.avoid) for route in later] == [(3, ("engine-0",))] * 2
            assert {route.request_id[-4:] for route in later} == {"-0.1"}
            first = {route.sampling.seed for route in cluster.routes if not route.generated}
            assert {route.sampling.seed for route in later} == first
            status, story = await gateway.get(f"/admin/story/{body['id']}")
            assert status == 200
            told = " ".join(entry["text"] for entry in story["entries"])
            assert f"interrupted after 3 tokens, migrate: engine engine-0 died while it ran this request ({end}" in told
            assert "accepted by engine-1" in told

    asyncio.run(scenario())


def test_a_slow_request_stays_on_an_engine_that_only_the_monitor_cannot_reach(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            cluster = gateway.cluster
            reply = cluster.replies[""]
            reply.text, reply.pause_at = LONG, 3
            streamed = asyncio.create_task(gateway.events("/v1/chat/completions", chat(stream=True)))
            await gateway.until(lambda: cluster.playing, "the stream to run")
            cluster.unheard |= {"engine-0", "engine-1"}
            await asyncio.sleep(RECENT_TOKENS_S + 1.0)
            reply.go.set()
            assert text_of(await streamed) == LONG
            assert len(cluster.routes) == 1

    asyncio.run(scenario())


def test_the_requests_of_the_only_engine_end_with_an_error_when_it_stays_away(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway("gateway.migrate_timeout_s=0.3") as gateway:
            cluster = gateway.cluster
            reply = cluster.replies[""]
            reply.text, reply.pause_at = LONG, 3
            doomed = asyncio.create_task(gateway.events("/v1/chat/completions", chat(stream=True)))
            whole = asyncio.create_task(gateway.post("/v1/chat/completions", chat()))
            await gateway.until(lambda: len(cluster.playing) == 2, "both to run")
            await asyncio.sleep(0.05)
            cluster.dead |= {"engine-0", "engine-1"}
            events = await doomed
            assert events[-1] == "[DONE]"
            error = events[-2]["error"]
            assert (error["type"], error["code"]) == ("server_error", "engine_died")
            assert "engine engine-0 died" in error["message"]
            status, body = await whole
            assert (status, body["error"]["code"]) == (503, "engine_died")

    asyncio.run(scenario())


def test_a_request_waits_for_its_only_engine_to_come_back(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            cluster = gateway.cluster
            reply = cluster.replies[""]
            reply.text, reply.pause_at = LONG, 3
            streamed = asyncio.create_task(gateway.events("/v1/chat/completions", chat(stream=True)))
            await gateway.until(lambda: cluster.playing, "the stream to run")
            await asyncio.sleep(0.05)
            cluster.dead |= {"engine-0", "engine-1"}
            await gateway.until(lambda: len(cluster.routes) > 3, "the router to be asked again")
            cluster.incarnations["engine-0"], reply.pause_at = "new" * 5, None
            cluster.dead.clear()
            assert text_of(await streamed) == LONG

    asyncio.run(scenario())


@pytest.mark.parametrize("code", ["draining", "adapter_unavailable"])
def test_a_request_that_its_engine_gives_up_continues_on_another(start_gateway: Start, code: str) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            reply = gateway.cluster.replies[""]
            reply.fail = code
            stream = asyncio.create_task(gateway.events("/v1/chat/completions", chat(stream=True)))
            await gateway.until(lambda: gateway.cluster.routes, "the request to be routed")
            await gateway.until(lambda: len(gateway.cluster.routes) > 1, "the next attempt")
            reply.fail = ""
            assert text_of(await stream) == "hello world"

    asyncio.run(scenario())


def test_a_request_that_kills_two_engines_is_quarantined(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            cluster = gateway.cluster
            cluster.engines.append("engine-2")
            cluster.incarnations["engine-2"] = "e2" * 8
            cluster.start_one("engine-2", ToEngine)
            cluster.replies[""].pause_at = 2
            call = asyncio.create_task(gateway.events("/v1/chat/completions", chat(stream=True)))
            for engine in ("engine-0", "engine-1"):
                ran = int(engine[-1]) + 1
                await gateway.until(lambda ran=ran: len(cluster.routes) == ran, "the request to run")
                await asyncio.sleep(0.05)
                cluster.dead.add(engine)
                gone = EngineGone(engine=engine, incarnation=cluster.incarnations[engine], ended=True)
                cluster.buses["monitor"].publish("gone", gone)
            assert (await call)[-2]["error"]["code"] == "request_quarantined"
            status, body = await gateway.post("/v1/chat/completions", chat())
            assert (status, body["error"]["code"]) == (422, "request_quarantined")
            assert len(cluster.routes) == 2, "engine-2 never saw it"
            cluster.replies[""].pause_at = None
            other = [{"role": "user", "content": "another"}]
            assert (await gateway.post("/v1/chat/completions", chat(messages=other)))[0] == 200

    asyncio.run(scenario())


def test_of_requests_that_die_together_only_the_cause_is_quarantined(start_gateway: Start) -> None:
    """Two engines end under the same two requests. In the trials that follow, only one request ends a third engine."""

    async def scenario() -> None:
        async with start_gateway() as gateway:
            cluster = gateway.cluster
            for number in (2, 3):
                cluster.engines.append(f"engine-{number}")
                cluster.incarnations[f"engine-{number}"] = f"e{number}" * 8
                cluster.start_one(f"engine-{number}", ToEngine)
            cluster.replies["pirate"] = dataclasses.replace(cluster.replies[""], pause_at=2)
            cluster.replies[""].pause_at = 2
            poison = asyncio.create_task(gateway.post("/v1/chat/completions", chat(model="pirate")))
            innocent = asyncio.create_task(gateway.post("/v1/chat/completions", chat()))
            for engine in ("engine-0", "engine-1"):
                ran = 2 * int(engine[-1]) + 2
                await gateway.until(lambda ran=ran: len(cluster.routes) == ran, "both to run")
                await asyncio.sleep(0.05)
                cluster.dead.add(engine)
                gone = EngineGone(engine=engine, incarnation=cluster.incarnations[engine], ended=True)
                if engine == "engine-1":
                    cluster.replies[""].pause_at = None
                cluster.buses["monitor"].publish("gone", gone)
            await gateway.until(lambda: any(r.adapter for r in cluster.routes[4:]), "the trial of the cause")
            await asyncio.sleep(0.05)
            gone = EngineGone(engine="engine-2", incarnation=cluster.incarnations["engine-2"], ended=True)
            cluster.buses["monitor"].publish("gone", gone)
            status, body = await innocent
            assert (status, body["choices"][0]["message"]["content"]) == (200, "hello world")
            status, body = await poison
            assert (status, body["error"]["code"]) == (422, "request_quarantined")

    asyncio.run(scenario())


def test_the_openai_client_raises_on_an_error_event(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            gateway.cluster.replies[""].fail = "engine_error"
            stream = await gateway.openai.chat.completions.create(model="tiny", messages=HI, stream=True)
            with pytest.raises(openai.APIError, match="why"):
                async for _ in stream:
                    pass
            status, body = await gateway.post("/v1/chat/completions", chat())
            assert (status, body["error"]["code"]) == (500, "engine_error")

    asyncio.run(scenario())


def test_lost_tokens_are_computed_again(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            reply = gateway.cluster.replies[""]
            for skipped in (2, len(gateway.cluster.encode(LONG))):
                gateway.cluster.routes.clear()
                reply.text, reply.skip_index = LONG, skipped
                streamed = asyncio.create_task(gateway.events("/v1/chat/completions", chat(stream=True)))
                await gateway.until(lambda: len(gateway.cluster.routes) > 1, "the next attempt")
                reply.skip_index = None
                assert text_of(await streamed) == LONG
            await gateway.until(lambda: gateway.cluster.aborts, "the engine to be told")

    asyncio.run(scenario())


def test_tokens_that_are_always_lost_fail_the_stream(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway("gateway.max_attempts=2") as gateway:
            reply = gateway.cluster.replies[""]
            reply.text, reply.skip_index, reply.delay_s = LONG, 2, 0.02
            events = await gateway.events("/v1/chat/completions", chat(stream=True))
            assert events[-2]["error"]["code"] == "stream_interrupted"
            await gateway.until(lambda: gateway.cluster.aborts, "the engine to be told")
            reply.skip_index = len(gateway.cluster.encode(LONG))
            status, body = await gateway.post("/v1/chat/completions", chat())
            assert (status, body["error"]["code"]) == (503, "stream_interrupted")
            assert len(gateway.cluster.routes) == 4

    asyncio.run(scenario())


def test_a_request_that_takes_too_long_times_out(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway("gateway.request_timeout_s=0.3") as gateway:
            gateway.cluster.replies[""].pause_at = 2
            status, body = await gateway.post("/v1/chat/completions", chat())
            assert (status, body["error"]["code"]) == (504, "timeout")
            events = await gateway.events("/v1/chat/completions", chat(stream=True))
            assert (events[-2]["error"]["code"], events[-1]) == ("timeout", "[DONE]")
            await gateway.until(lambda: len(gateway.cluster.aborts) == 2, "the engine to be told of both")

    asyncio.run(scenario())


def test_a_client_that_does_not_read_is_disconnected(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway("gateway.request_timeout_s=1.0") as gateway:
            # Each token has about 60 kB of logprobs, so the answer is far larger than all socket buffers.
            gateway.cluster.replies[""].text = "hello " * 40
            body = json.dumps(chat(stream=True, logprobs=True, top_logprobs=20, n=100)).encode()
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.service.port, limit=1024)
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            await reader.readline()
            await gateway.until(lambda: not gateway.service.gateway.connections.requests, "the request to be cut off")
            assert len(gateway.service.gateway.streams) == 0
            outcome = gateway.service.gateway.metrics.requests.labels("tiny", "timeout")
            assert outcome._value.get() == 1
            writer.close()

    asyncio.run(scenario())


def test_draining_lets_streams_finish(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            reply = gateway.cluster.replies[""]
            reply.text, reply.delay_s = "hello world " * 3, 0.02
            running = asyncio.create_task(gateway.events("/v1/chat/completions", chat(stream=True)))
            await gateway.until(lambda: gateway.cluster.playing, "the stream to run")
            gateway.service.stop()
            await gateway.until(lambda: gateway.service.gateway.connections.is_draining, "draining")
            with pytest.raises(OSError, match=r"refused|Connect"):
                await asyncio.open_connection("127.0.0.1", gateway.service.port)
            events = await running
            assert events[-2]["choices"][0]["finish_reason"] == "stop"

    asyncio.run(scenario())


def test_draining_ends_at_its_deadline(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway("gateway.drain_timeout_s=0.2") as gateway:
            gateway.cluster.replies[""].pause_at = 2
            running = asyncio.create_task(gateway.events("/v1/chat/completions", chat(stream=True)))
            await gateway.until(lambda: gateway.cluster.playing, "the stream to run")
            await asyncio.sleep(0.05)
            gateway.service.stop()
            events = await running
            assert events[-2]["error"]["code"] == "shutting_down"

    asyncio.run(scenario())


def test_the_error_for_a_busy_port_names_the_remedy(start_gateway: Start) -> None:
    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(ConfigError, match=rf"gateway\.port {port}: it is in use.*--set gateway\.port"):
                async with start_gateway(f"gateway.port={port}"):
                    pass

    asyncio.run(scenario())
