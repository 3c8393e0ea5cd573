"""What clients receive when something fails, and what engines are told when clients leave."""

import asyncio
import json
import socket
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import openai
import pytest

from loraserve.errors import ConfigError
from loraserve.messages import Rejected, ToRouter

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


def test_a_router_that_does_not_answer_gives_an_error(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway("gateway.route_timeout_s=0.1") as gateway:
            gateway.cluster.route_silent = True
            status, body = await gateway.post("/v1/chat/completions", chat())
            assert (status, body["error"]["code"]) == (503, "router_unavailable")

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


def test_the_error_for_a_router_that_dies_twice_names_the_lost_connection(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            cluster = gateway.cluster
            cluster.route_silent = True
            call = asyncio.create_task(gateway.post("/v1/chat/completions", chat()))
            for asked in (1, 2):
                await gateway.until(lambda asked=asked: len(cluster.routes) == asked, "the router to be asked")
                cluster.network.kill("router")
                cluster.start_one("router", ToRouter)
            status, body = await call
            assert (status, body["error"]["code"]) == (503, "router_unavailable")
            assert "its connection was lost" in body["error"]["message"]

    asyncio.run(scenario())


def test_a_rejected_choice_aborts_the_others(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway("gateway.route_timeout_s=0.3") as gateway:
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


def test_a_dead_engine_gives_an_error_event_and_other_streams_continue(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            cluster = gateway.cluster
            reply = cluster.replies[""]
            reply.text, reply.pause_at = LONG, 3
            doomed = asyncio.create_task(gateway.events("/v1/chat/completions", chat(stream=True)))
            whole = asyncio.create_task(gateway.post("/v1/chat/completions", chat()))
            await gateway.until(lambda: len(cluster.playing) == 2, "both to run")
            await asyncio.sleep(0.05)
            cluster.dead.add("engine-0")
            fine = await gateway.openai.chat.completions.with_raw_response.create(
                model="pirate", messages=HI, max_tokens=2
            )
            assert fine.headers["x-loraserve-engine"] == "engine-1"
            events = await doomed
            assert events[-1] == "[DONE]"
            error = events[-2]["error"]
            assert (error["type"], error["code"]) == ("server_error", "engine_died")
            assert "engine engine-0 died" in error["message"]
            status, body = await whole
            assert (status, body["error"]["code"]) == (503, "engine_died")

    asyncio.run(scenario())


def test_an_engine_restart_is_noticed(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            gateway.cluster.replies[""].pause_at = 2
            call = asyncio.create_task(gateway.post("/v1/chat/completions", chat()))
            await gateway.until(lambda: gateway.cluster.playing, "the request to run")
            gateway.cluster.incarnations["engine-0"] = "new" * 5
            status, body = await call
            assert (status, body["error"]["code"]) == (503, "engine_died")
            assert "restarted" in body["error"]["message"]

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


def test_lost_tokens_fail_the_stream(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            reply = gateway.cluster.replies[""]
            reply.text, reply.skip_index, reply.delay_s = LONG, 2, 0.02
            events = await gateway.events("/v1/chat/completions", chat(stream=True))
            assert events[-2]["error"]["code"] == "stream_interrupted"
            await gateway.until(lambda: gateway.cluster.aborts, "the engine to be told")
            reply.skip_index = len(gateway.cluster.encode(LONG))
            status, body = await gateway.post("/v1/chat/completions", chat())
            assert (status, body["error"]["code"]) == (503, "stream_interrupted")

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
            await gateway.until(lambda: not gateway.service.gateway.active_requests, "the request to be cut off")
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
            await gateway.until(lambda: gateway.service.gateway.draining, "draining")
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
