"""The operators' scripts against the real cluster."""

import asyncio
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loraserve.demo.shipped import SHIPPED_DIR
from loraserve.demo.weights import expand_rank
from loraserve.testing.local_cluster import LocalCluster, chat

NAME, RANK = "ops-pirate", 12
"""An adapter that only this file uses, at a rank of its own and therefore with a version of its own."""

FORECAST_TIMEOUT_S = 30.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("ops")
    expand_rank(SHIPPED_DIR / "pirate", target, RANK, seed=RANK)
    return target


@pytest.fixture
def loaded(cluster: LocalCluster, folder: Path) -> Iterator[str]:
    assert ops(cluster, "adapters", "load", NAME, str(folder)).returncode == 0
    yield NAME
    assert ops(cluster, "adapters", "unload", NAME).returncode == 0


def ops(cluster: LocalCluster, *command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "loraserve.ops", *command, "--url", cluster.url], capture_output=True, text=True
    )


def answer(cluster: LocalCluster, *command: str) -> Any:
    """Run a command with --json, which must succeed, and return its output."""
    done = ops(cluster, *command, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def complete_story(cluster: LocalCluster, subject: str) -> Any:
    """Return a story to which every process has answered in time, which a busy one may not at once."""
    for _ in range(10):
        story = answer(cluster, "story", subject)
        if not story["silent"]:
            return story
    raise AssertionError(f"no answer from {story['silent']}")


def ranks(cards: list[dict[str, Any]]) -> dict[str, int]:
    return {card["id"]: card["rank"] for card in cards}


def plan(cluster: LocalCluster) -> dict[str, Any]:
    with urllib.request.urlopen(f"{cluster.url}/admin/plan") as response:
        content: dict[str, Any] = json.load(response)
        return content


def ask_until_forecast(cluster: LocalCluster, name: str) -> None:
    """Send requests until the monitor forecasts demand, which the planner places copies by."""

    async def ask() -> None:
        async with cluster.session() as http, asyncio.timeout(FORECAST_TIMEOUT_S):
            while not any(d["name"] == name and d["forecast_tokens_per_s"] > 0 for d in await demand(http)):
                await chat(http, name, "What is the capital of Italy?", max_tokens=16)

    async def demand(http: Any) -> list[dict[str, Any]]:
        seen: list[dict[str, Any]] = (await cluster.admin(http))["demand"]
        return seen

    asyncio.run(ask())


def test_status_names_every_process_engine_and_adapter(cluster: LocalCluster) -> None:
    state = answer(cluster, "status")
    expected = {"store", "planner", "monitor", "router", "engine-0", "engine-1"}
    assert {name for name, process in state["processes"].items() if process["state"] == "READY"} == expected
    assert [engine["name"] for engine in state["engines"] if engine["alive"]] == ["engine-0", "engine-1"]
    shown = ops(cluster, "status")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert {line.split()[0] for line in shown.stdout.splitlines() if " READY " in line} == {*expected, "gateway-0"}
    assert f"{len(state['registry']['adapters'])} adapters" in shown.stdout


def test_watch_prints_the_status_repeatedly(cluster: LocalCluster) -> None:
    command = [sys.executable, "-m", "loraserve.ops", "status", "--watch", "--json", "--url", cluster.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
        try:
            assert watching.stdout is not None
            two = [json.loads(watching.stdout.readline()) for _ in range(2)]
        finally:
            watching.terminate()
    assert [state["gateway"]["name"] for state in two] == ["gateway-0", "gateway-0"]


def test_the_story_of_a_request_names_gateway_router_and_engine(cluster: LocalCluster) -> None:
    body = {"model": "pirate", "prompt": "What is the moon?", "max_tokens": 4, "ignore_eos": True}
    request = urllib.request.Request(
        f"{cluster.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        engine, http_id = response.headers["x-loraserve-engine"], response.headers["x-request-id"]
        id_ = json.load(response)["id"]
    for known in (id_, http_id):
        story = complete_story(cluster, known)
        assert {entry["process"] for entry in story["entries"]} == {"gateway-0", "router", engine}
        texts = [entry["text"] for entry in story["entries"]]
        assert any(text.startswith(f"sent to {engine}, ") for text in texts)
        assert any(text.startswith("finished: length") for text in texts)
        times = [entry["unix_s"] for entry in story["entries"]]
        assert times == sorted(times)
    assert "sent to" in ops(cluster, "story", id_).stdout
    unknown = ops(cluster, "story", "no-such-id")
    assert (unknown.returncode, "no process knows no-such-id" in unknown.stdout) == (1, True)


def test_the_story_of_an_adapter_names_registration_and_load(cluster: LocalCluster, loaded: str) -> None:
    ask_until_forecast(cluster, loaded)
    story = complete_story(cluster, loaded)
    by_process = {entry["process"]: entry["text"] for entry in story["entries"]}
    assert by_process["store"].startswith(("registered", "unregistered"))
    loads = [e["process"] for e in story["entries"] if e["text"].startswith("loaded from ")]
    assert loads
    assert all(process.startswith("engine-") for process in loads)
    version = next(subject for subject in story["subjects"] if len(subject) == 64)
    again = complete_story(cluster, version[:12])["entries"]
    assert again[: len(story["entries"])] == story["entries"]


def test_an_adapter_is_loaded_listed_and_unloaded(cluster: LocalCluster, folder: Path) -> None:
    before = answer(cluster, "adapters", "list")
    assert ops(cluster, "adapters", "load", NAME, str(folder)).returncode == 0
    try:
        assert ranks(answer(cluster, "adapters")) == ranks(before) | {NAME: RANK}
        other = ["adapters", "load", NAME, str(SHIPPED_DIR / "pirate")]
        taken = ops(cluster, *other)
        assert taken.returncode == 1
        assert "--replace" in taken.stderr
        assert ops(cluster, *other, "--replace").returncode == 0
        assert ranks(answer(cluster, "adapters")) == ranks(before) | {NAME: 8}
        assert NAME in ops(cluster, "adapters").stdout
    finally:
        gone = ops(cluster, "adapters", "unload", NAME)
    assert gone.returncode == 0
    assert answer(cluster, "adapters", "list") == before
    twice = ops(cluster, "adapters", "unload", NAME)
    assert twice.returncode == 1
    assert twice.stderr == f"error: The lora adapter '{NAME}' cannot be found.\n"


def test_a_folder_that_is_no_adapter_is_refused_in_one_line(cluster: LocalCluster, tmp_path: Path) -> None:
    refused = ops(cluster, "adapters", "load", NAME, str(tmp_path))
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: ")
    assert "adapter_config.json" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_a_dry_run_says_what_would_move_and_moves_nothing(cluster: LocalCluster, loaded: str) -> None:
    ask_until_forecast(cluster, loaded)
    for _ in range(3):
        # The planner also plans by itself; where it did so in between, these two differ.
        before, would, after = plan(cluster), answer(cluster, "rebalance", "--dry-run"), plan(cluster)
        if before == after:
            break
    assert before == after
    assert not would["applied"]
    assert would["plan"]["epoch"] == before["epoch"] + 1
    # By version: the same slab has two names here, and goes by either.
    planned = {(p["version"], p["engine"]) for p in before["placements"]}
    wanted = {(p["version"], p["engine"]) for p in would["plan"]["placements"]}
    assert {(m["version"], m["target"]) for m in would["moves"] if m["target"]} == wanted - planned
    assert loaded in {p["name"] for p in would["plan"]["placements"]}


def test_a_rebalance_places_requested_adapters_and_drops_unloaded_ones(cluster: LocalCluster, folder: Path) -> None:
    assert ops(cluster, "adapters", "load", NAME, str(folder)).returncode == 0
    try:
        ask_until_forecast(cluster, NAME)
        done = ops(cluster, "rebalance")
        assert done.returncode == 0, done.stdout + done.stderr
        placed = plan(cluster)
        assert NAME in {p["name"] for p in placed["placements"]}
        assert f"epoch {placed['epoch']}" in done.stdout
    finally:
        assert ops(cluster, "adapters", "unload", NAME).returncode == 0
    emptied = answer(cluster, "rebalance")
    assert emptied["plan"]["epoch"] > placed["epoch"]
    assert NAME not in {p["name"] for p in plan(cluster)["placements"]}
    again = answer(cluster, "rebalance")
    assert again["failed"] == []
