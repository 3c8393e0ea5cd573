"""The planner, an engine and the router are killed with SIGKILL during roll-outs, while streams run."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest

from loraserve.model_shape import read_model_config, shape_from_config
from loraserve.testing.local_cluster import LocalCluster, chat
from loraserve.testing.tiny_model import write_peft_adapter, write_tiny_model
from loraserve.testing.tiny_tokenizer import write_tiny_tokenizer

NAMES = tuple(f"tenant-{number}" for number in range(6))
QUESTION = "Tell me a story about the sea."
LONG_TOKENS, SHORT_TOKENS = 600, 8
SETTLE_S = 30.0
ROUTER_RESTART_S = 5.0
SETTINGS = {
    # Small pieces make a load slow, so that there is time to kill a process during it.
    "engine.load_chunk_bytes": 128,
    # Without transports, engines do not read from peers, which would be too fast for these kills.
    "transfer.transports": "[]",
    "engine.weights": "float32",
    "engine.slab_dtype": "float32",
    "engine.pool_bytes": 64 << 20,
    "engine.kv_bytes": 256 << 20,
    "planner.interval_s": 3,
    "planner.min_copies": 1,
}


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Two engines with a tiny random model and six adapters."""
    root = tmp_path_factory.mktemp("rollout")
    model = root / "tiny"
    write_tiny_model(model, "llama", vocab_size=512, max_position_embeddings=4096)
    write_tiny_tokenizer(model)
    shape = shape_from_config(read_model_config(model))
    adapters: dict[str, Path] = {}
    for seed, name in enumerate(NAMES):
        adapters[name] = root / name
        write_peft_adapter(adapters[name], shape, 16, seed=seed, strength=2.0)
    flags = [flag for key, value in SETTINGS.items() for flag in ("--set", f"{key}={value}")]
    with LocalCluster(root / "data", "--model", str(model), "--engines", "2", *flags, adapters=adapters) as running:
        yield running


class Traffic:
    """Streams that run all the time. Each output is compared with the adapter's undisturbed output."""

    def __init__(self, http: aiohttp.ClientSession) -> None:
        self._http = http
        self.expected: dict[tuple[str, int], str] = {}
        self.ended: list[tuple[str, float, float]] = []
        """(engine, sent, ended) of complete streams."""
        self.broken: list[tuple[str, str, float]] = []
        """(engine, error code, time) of streams that ended with an error."""
        self.refused: list[tuple[str, float]] = []
        """(answer, time) of requests that were refused."""
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def learn(self) -> None:
        for name in NAMES:
            for tokens in (SHORT_TOKENS, LONG_TOKENS):
                self.expected[name, tokens] = (await self.ask(name, tokens)).text
        assert len(set(self.expected.values())) == len(self.expected), "adapters cannot be told apart"

    async def ask(self, name: str, tokens: int) -> Any:
        return await chat(self._http, name, QUESTION, max_tokens=tokens, ignore_eos=True)

    def start(self) -> None:
        plans = [(NAMES[:3], LONG_TOKENS), (NAMES[3:], LONG_TOKENS), (NAMES, SHORT_TOKENS)]
        self._tasks = [asyncio.create_task(self._stream(names, tokens)) for names, tokens in plans]

    async def stop(self) -> None:
        self._stop.set()
        await asyncio.gather(*self._tasks)

    async def _stream(self, names: tuple[str, ...], tokens: int) -> None:
        turn = 0
        while not self._stop.is_set():
            turn += 1
            name, sent_s = names[turn % len(names)], time.monotonic()
            try:
                answer = await self.ask(name, tokens)
            except AssertionError as refusal:
                self.refused.append((str(refusal), time.monotonic()))
                await asyncio.sleep(0.1)
                continue
            if answer.error is not None:
                self.broken.append((answer.engine, answer.error["code"], time.monotonic()))
                assert self.expected[name, tokens].startswith(answer.text)
                continue
            assert answer.text == self.expected[name, tokens], f"{name} said something else on {answer.engine}"
            self.ended.append((answer.engine, sent_s, time.monotonic()))


async def post(http: aiohttp.ClientSession, path: str) -> int:
    async with http.post(path, json={}) as response:
        await response.read()
        return response.status


async def plan_of(http: aiohttp.ClientSession) -> dict[str, Any]:
    async with http.get("/admin/plan") as response:
        content: dict[str, Any] = await response.json()
        return content if response.status == 200 else {}


def pinned(state: dict[str, Any]) -> dict[str, set[str]]:
    return {
        engine["name"]: {adapter["name"] for adapter in engine["load"]["adapters"]["resident"] if adapter["pinned"]}
        for engine in state["engines"]
        if engine["alive"] and engine["load"]["state"] == "READY"
    }


async def until(what: str, condition: Callable[[], Awaitable[Any]]) -> Any:
    deadline_s = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline_s:
        found = await condition()
        if found:
            return found
        await asyncio.sleep(0.1)
    raise AssertionError(f"not within {SETTLE_S:.0f} s: {what}")


async def loading_engines(tenants: LocalCluster, http: aiohttp.ClientSession, epoch: int) -> list[str]:
    """Return the engines that load for a plan of this epoch or later. Other engines may load for a request."""
    loads = [engine["load"] for engine in (await tenants.admin(http))["engines"]]
    held = [(load["engine"], load["adapters"]) for load in loads]
    return [engine for engine, adapters in held if adapters["loading"] and adapters["plan_epoch"] >= epoch]


async def settled_plan(tenants: LocalCluster, http: aiohttp.ClientSession, drained: list[str]) -> dict[str, Any]:
    """Return the plan in force, or {} unless each engine holds exactly its copies and each adapter has a copy."""
    plan, held = await plan_of(http), pinned(await tenants.admin(http))
    wanted: dict[str, set[str]] = {"engine-0": set(), "engine-1": set()}
    for copy in plan.get("placements", ()):
        wanted[copy["engine"]].add(copy["name"])
    whole = {name for names in wanted.values() for name in names} == set(NAMES)
    empty = all(not wanted[engine] for engine in drained)
    return plan if whole and empty and held == wanted and plan["drained"] == drained else {}


class KillTimes(NamedTuple):
    """The monotonic times at which the processes were killed."""

    planner_s: float
    engine_s: float
    router_s: float


async def kill_during_roll_outs(tenants: LocalCluster, http: aiohttp.ClientSession, epoch: int) -> KillTimes:
    """Kill the planner while engine-0 is drained, and engine-1 and the router while engine-0 is used again."""
    draining = asyncio.create_task(post(http, "/admin/engines/engine-0/drain"))
    await until("engine-1 loads what engine-0 held", lambda: loading_engines(tenants, http, epoch + 1))
    tenants.kill("planner")
    planner_s = time.monotonic()
    assert await draining == 503, "it died before it could answer"
    drained = await until("engine-0 is empty", lambda: settled_plan(tenants, http, ["engine-0"]))
    assert drained["epoch"] > epoch

    tenants.kill("engine-1")
    engine_s = time.monotonic()
    undraining = asyncio.create_task(post(http, "/admin/engines/engine-0/undrain"))
    lost = "engine-1 is back and loads what it had lost"
    await until(lost, lambda: loading_engines(tenants, http, drained["epoch"]))
    tenants.kill("router")
    router_s = time.monotonic()
    assert await undraining == 200
    after = await until("a plan of both engines", lambda: settled_plan(tenants, http, []))
    assert after["epoch"] > drained["epoch"]
    return KillTimes(planner_s, engine_s, router_s)


def check_traffic(traffic: Traffic, killed: KillTimes) -> str:
    """Check that no stream broke. Return a summary of the traffic."""
    assert not traffic.broken, "the requests of the killed engine migrate"
    late = [text for text, when_s in traffic.refused if not 0 < when_s - killed.router_s < ROUTER_RESTART_S]
    assert not late, "only a router that has just started does not know yet which engines are ready"
    gap_s = longest_gap_s([sent_s for _, sent_s, _ in traffic.ended], killed.planner_s)
    return (
        f"planner, engine and router killed in roll-outs: {len(traffic.ended)} streams whole, "
        f"{len(traffic.refused)} refused by a router just "
        f"started, new ones began at most {gap_s:.1f} s apart"
    )


def test_streams_survive_the_death_of_processes_during_a_roll_out(
    tenants: LocalCluster, measured: Callable[[str], None]
) -> None:
    async def scenario() -> None:
        async with tenants.session() as http:
            traffic = Traffic(http)
            await traffic.learn()
            before = await until("a first plan", lambda: settled_plan(tenants, http, []))
            traffic.start()
            killed = await kill_during_roll_outs(tenants, http, before["epoch"])
            served_s = time.monotonic()
            await until("a stream that began after all of it", lambda: _later(traffic, served_s))
            await traffic.stop()
            measured(check_traffic(traffic, killed))

    asyncio.run(scenario())


def test_operators_drain_an_engine_and_use_it_again(tenants: LocalCluster) -> None:
    def ops(*command: str) -> "subprocess.CompletedProcess[str]":
        whole = [sys.executable, "-m", "loraserve.ops", *command, "--url", tenants.url]
        return subprocess.run(whole, capture_output=True, text=True)

    drained = ops("drain", "engine-1", "--timeout", "30")
    assert drained.returncode == 0, drained.stdout + drained.stderr
    assert "engine-1 is drained" in drained.stdout
    assert "DRAINED" in next(line for line in ops("status").stdout.splitlines() if line.startswith("engine-1  DR"))
    unknown = ops("drain", "engine-7")
    assert (unknown.returncode, "there are engine-0, engine-1" in unknown.stderr) == (1, True)
    undrained = ops("undrain", "engine-1")
    assert undrained.returncode == 0, undrained.stdout + undrained.stderr
    assert "DRAINED" not in ops("status").stdout


async def _later(traffic: Traffic, since_s: float) -> bool:
    return any(sent_s > since_s for _, sent_s, _ in traffic.ended)


def longest_gap_s(times_s: list[float], since_s: float) -> float:
    ordered = sorted(time_s for time_s in times_s if time_s > since_s)
    return max(later - earlier for earlier, later in pairwise(ordered))
