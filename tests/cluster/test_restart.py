"""Restarts of processes under steady load: no connection is refused and no request fails."""

import asyncio
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from loraserve.testing.local_cluster import LocalCluster, chat
from loraserve.testing.tiny_model import write_tiny_model
from loraserve.testing.tiny_tokenizer import write_tiny_tokenizer

RESTART_TIMEOUT_S = 180.0
PROCESSES = ("store", "planner", "monitor", "router", "engine-0", "engine-1", "gateway-0")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    model = tmp_path / "tiny"
    write_tiny_model(model, "qwen3", vocab_size=512)
    write_tiny_tokenizer(model)
    return model


@pytest.fixture
def two_engines(tiny: Path, tmp_path: Path) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path / "data", "--model", str(tiny), "--engines", "2") as running:
        yield running


class Outcomes:
    """What a steady load saw: texts by prompt, failures, and the longest time of a request."""

    def __init__(self) -> None:
        self.requests = 0
        self.failures: list[str] = []
        self.longest_s = 0.0

    async def record(self, send: Callable[[], Awaitable[str]]) -> None:
        self.requests += 1
        sent_s = time.monotonic()
        try:
            problem = await send()
        except (aiohttp.ClientError, OSError, TimeoutError, AssertionError) as error:
            problem = f"{type(error).__name__}: {error}"
        self.longest_s = max(self.longest_s, time.monotonic() - sent_s)
        if problem:
            self.failures.append(problem)


async def complete(http: aiohttp.ClientSession, model: str, **headers: str) -> str:
    """Send a short request. Returns the problem, or ""."""
    body = {"model": model, "prompt": "hi", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    async with http.post("/v1/completions", json=body, headers=headers) as response:
        return "" if response.status == 200 else f"{response.status} {await response.text()}"


async def new_connections(cluster: LocalCluster, model: str, seen: Outcomes, until: asyncio.Event) -> None:
    """Send a request on a new connection every 50 ms, whether or not the former ones were answered."""
    async with cluster.session() as http, asyncio.TaskGroup() as tasks:
        while not until.is_set():
            tasks.create_task(seen.record(lambda: complete(http, model, Connection="close")))
            await asyncio.sleep(0.05)


async def kept_connection(
    cluster: LocalCluster, model: str, pause_s: float, seen: Outcomes, until: asyncio.Event
) -> None:
    """Send one request after the other on the same connection, as long as the gateway keeps it."""
    async with cluster.session() as http:
        while not until.is_set():
            await seen.record(lambda: complete(http, model))
            await asyncio.sleep(pause_s)


async def streams(
    cluster: LocalCluster, model: str, texts: dict[str, str], seen: Outcomes, until: asyncio.Event
) -> None:
    """Stream the answers to the known questions in turn and compare the texts."""

    async def stream(http: aiohttp.ClientSession, question: str) -> str:
        answer = await chat(http, model, question, max_tokens=LONG, ignore_eos=True)
        if answer.error:
            return str(answer.error)
        return "" if answer.text == texts[question] else f"wrong text for {question!r}: {answer.text!r}"

    async with cluster.session() as http:
        while not until.is_set():
            for question in texts:
                await seen.record(lambda question=question: stream(http, question))  # type: ignore[misc]


async def restart(cluster: LocalCluster, *processes: str) -> str:
    """Run the restart command and return its output. Raises AssertionError if it fails."""
    command = await asyncio.create_subprocess_exec(
        *cluster.command("restart", *processes), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output, _ = await asyncio.wait_for(command.communicate(), RESTART_TIMEOUT_S)
    assert command.returncode == 0, output.decode()
    return output.decode()


async def under_load(load: list[Any], until: asyncio.Event, restart_now: Callable[[], Awaitable[str]]) -> str:
    running = [asyncio.ensure_future(work) for work in load]
    try:
        await asyncio.sleep(1.0)
        output = await restart_now()
        await asyncio.sleep(1.0)
    finally:
        until.set()
        await asyncio.gather(*running)
    return output


def test_a_restart_of_the_only_gateway_refuses_and_fails_nothing(
    tiny: Path, tmp_path: Path, measured: Callable[[str], None]
) -> None:
    async def scenario(cluster: LocalCluster) -> None:
        before = cluster.pids()
        until, new, kept = asyncio.Event(), Outcomes(), Outcomes()
        load = [new_connections(cluster, tiny.name, new, until)]
        load += [kept_connection(cluster, tiny.name, pause_s, kept, until) for pause_s in (0.0, 0.0, 0.1, 0.5, 0.9)]
        output = await under_load(load, until, lambda: restart(cluster, "gateway-0"))
        assert "gateway-0: ready after" in output
        after = cluster.pids()
        assert {name for name in before if before[name] != after[name]} == {"gateway-0"}
        measured(
            f"only gateway restarted: {new.requests} new connections, longest {new.longest_s:.1f} s, "
            f"{kept.requests} requests on kept connections, failed {len(new.failures)} and {len(kept.failures)}"
        )
        assert (new.failures, kept.failures) == ([], [])

    with LocalCluster(tmp_path / "data", "--model", str(tiny), "--engines", "1") as running:
        asyncio.run(scenario(running))


LONG = 200


def test_a_restart_of_all_processes_interrupts_no_stream(
    two_engines: LocalCluster, tiny: Path, measured: Callable[[str], None]
) -> None:
    async def scenario() -> None:
        async with two_engines.session() as http:
            questions = [f"question {number}" for number in range(4)]
            texts = {q: (await chat(http, tiny.name, q, max_tokens=LONG, ignore_eos=True)).text for q in questions}
        assert len(set(texts.values())) > 1
        before = two_engines.pids()
        until, streamed, new = asyncio.Event(), Outcomes(), Outcomes()
        load = [streams(two_engines, tiny.name, texts, streamed, until) for _ in range(4)]
        load.append(new_connections(two_engines, tiny.name, new, until))
        output = await under_load(load, until, lambda: restart(two_engines))
        after = two_engines.pids()
        assert {name for name in before if before[name] != after[name]} == set(PROCESSES)
        order = [line.partition("s] ")[2].partition(":")[0] for line in output.splitlines() if "ready after" in line]
        assert order == list(PROCESSES)
        measured(
            f"all processes restarted: {streamed.requests} streams, longest {streamed.longest_s:.1f} s, "
            f"{new.requests} new connections, failed {len(streamed.failures)} and {len(new.failures)}"
        )
        assert (streamed.failures, new.failures) == ([], [])

    asyncio.run(scenario())
