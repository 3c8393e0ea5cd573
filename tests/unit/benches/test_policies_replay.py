"""The load generator of scripts/bench policies against a small server, and its statistics."""

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest
from aiohttp import web
from live.replay import Replayed, Served, replay

from loraserve.sim.workload import SimRequest, Workload, make_adapters

WAIT_S = 0.05
WORKLOAD = Workload(
    "test",
    make_adapters((8, 128), 100, ("small", "large")),
    (SimRequest(0.0, 0, 5, 3), SimRequest(0.01, 1, 7, 2), SimRequest(0.02, 0, 4, 3), SimRequest(0.03, 1, 9, 2)),
)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def piece(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
    return f"data: {json.dumps({'choices': [choice]}, separators=(',', ':'))}\n\n".encode()


async def begun(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "x-loraserve-engine": "engine-1"})
    await response.prepare(request)
    return response


def replayed(handler: Handler, warmup: float = 0.0) -> Replayed:
    async def run() -> Replayed:
        app = web.Application()
        app.router.add_post("/v1/completions", handler)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            return await replay(f"http://127.0.0.1:{runner.addresses[0][1]}", WORKLOAD, 94, warmup)
        finally:
            await runner.cleanup()

    return asyncio.run(run())


def test_every_request_is_sent_for_its_adapter_and_timed_from_when_it_was_due() -> None:
    bodies = []

    async def stream(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        bodies.append((body["model"], len(body["prompt"]), body["max_tokens"], body["stream"]))
        response = await begun(request)
        await asyncio.sleep(WAIT_S)
        await response.write(piece(""))
        await response.write(piece("a"))
        await response.write(piece("b", "length"))
        return response

    result = replayed(stream)
    assert sorted(bodies) == sorted(
        (WORKLOAD.adapters[r.adapter].name, r.prompt_tokens, r.output_tokens, True) for r in WORKLOAD.requests
    )
    assert [served.due_s for served in result.served] == [0.0, 0.01, 0.02, 0.03]
    assert all(served.ttft_s >= WAIT_S and served.sent_s >= served.due_s for served in result.served)
    assert result.engines == {"engine-1": 4}
    assert result.errors == 0


def test_the_first_requests_only_warm_up() -> None:
    async def stream(request: web.Request) -> web.StreamResponse:
        response = await begun(request)
        await response.write(piece("a", "length"))
        return response

    assert [served.due_s for served in replayed(stream, warmup=0.5).served] == [0.02, 0.03]


async def refuses(request: web.Request) -> web.StreamResponse:
    return web.json_response({"error": {"message": "too much"}}, status=429)


async def breaks_off(request: web.Request) -> web.StreamResponse:
    response = await begun(request)
    await response.write(piece("a"))
    return response


async def fails_midway(request: web.Request) -> web.StreamResponse:
    response = await begun(request)
    await response.write(piece("a"))
    await response.write(b'data: {"error":{"message":"engine died"}}\n\n')
    return response


@pytest.mark.parametrize(
    ("handler", "said"),
    [(refuses, "429: "), (breaks_off, "ended without a finish_reason"), (fails_midway, "engine died")],
)
def test_a_failed_request_has_an_infinite_ttft(handler: Handler, said: str) -> None:
    result = replayed(handler)
    assert result.errors == 4
    assert all(said in served.error for served in result.served)
    assert result.ttft_s(0.95) is None
    assert result.goodput_rps(10.0) == 0.0


def test_a_missing_server_is_an_error_of_each_request() -> None:
    result = asyncio.run(replay("http://127.0.0.1:9", WORKLOAD, 94, 0.0))
    assert result.errors == 4


def test_percentiles_and_goodput() -> None:
    def one(number: int) -> Served:
        due_s = float(number)
        return Served(due_s=due_s, sent_s=due_s + 0.01, first_s=due_s + 0.1 * (number + 1), end_s=due_s + 5)

    result = Replayed([one(number) for number in range(11)])
    assert result.ttft_s(0.5) == pytest.approx(0.6)
    assert result.ttft_s(0.95) == pytest.approx(1.1)
    # Five of eleven begin within half a second, in ten seconds.
    assert result.goodput_rps(0.55) == pytest.approx(0.5)
    assert result.late_s == pytest.approx(0.01)
    # One that failed is slower than any other.
    failed = Replayed([*result.served[:10], Served(due_s=10.0, error="500: no")])
    assert failed.ttft_s(0.5) == pytest.approx(0.6)
    assert failed.ttft_s(0.95) is None
    assert Replayed([]).goodput_rps(1.0) is None
