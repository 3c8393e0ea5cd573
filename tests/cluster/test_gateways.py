"""Several gateways behind one port, and a cluster whose processes talk over TCP."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from loraserve.testing.local_cluster import LocalCluster, chat, free_port
from loraserve.testing.tiny_model import write_tiny_model
from loraserve.testing.tiny_tokenizer import write_tiny_tokenizer

GATEWAYS = {"gateway-0", "gateway-1"}
ACCEPT_TIMEOUT_S = 60.0
REQUESTS = 24


def write_tiny(folder: Path) -> Path:
    model = folder / "tiny"
    write_tiny_model(model, "qwen3", vocab_size=512)
    write_tiny_tokenizer(model)
    return model


async def get(cluster: LocalCluster, path: str) -> Any:
    """Return the answer to a request on a connection of its own, decoded if it is JSON."""
    async with cluster.session() as http, http.get(path, headers={"Connection": "close"}) as response:
        return await (response.json() if response.content_type == "application/json" else response.text())


async def accepting(cluster: LocalCluster, expected: set[str]) -> Counter[str]:
    """Open connections until all expected gateways have accepted one. Returns how many each has accepted."""
    seen: Counter[str] = Counter()
    deadline_s = time.monotonic() + ACCEPT_TIMEOUT_S
    while not expected <= seen.keys() and time.monotonic() < deadline_s:
        answers = await asyncio.gather(*(get(cluster, "/live") for _ in range(10)))
        seen.update(answer["name"] for answer in answers)
    return seen


async def requests_by_gateway(cluster: LocalCluster) -> dict[str, float]:
    families = text_string_to_metric_families(await get(cluster, "/metrics"))
    samples = next(family.samples for family in families if family.name == "loraserve_requests")
    return {s.labels["gateway"]: s.value for s in samples if s.name.endswith("_total") and s.labels["outcome"] == "ok"}


async def check_common_answers(cluster: LocalCluster, model: str) -> None:
    """Check that each gateway tells about the requests of both."""

    async def ask(number: int) -> None:
        async with cluster.session() as http:
            body = {"model": model, "prompt": "hi", "max_tokens": 4}
            async with http.post("/v1/completions", json=body, headers={"x-request-id": f"mine-{number}"}) as response:
                assert response.status == 200

    await asyncio.gather(*(ask(number) for number in range(REQUESTS)))
    receivers = set()
    for number in range(REQUESTS):
        story = await get(cluster, f"/admin/story/mine-{number}")
        processes = {entry["process"] for entry in story["entries"]}
        assert {"router", "engine-0"} < processes, story
        receivers |= processes & GATEWAYS
    assert receivers == GATEWAYS
    for _ in range(10):
        counted = await requests_by_gateway(cluster)
        assert counted.keys() == GATEWAYS
        assert sum(counted.values()) == REQUESTS
        state = await get(cluster, "/admin/cluster")
        others = {name: process["state"] for name, process in state["processes"].items() if name in GATEWAYS}
        assert others == dict.fromkeys(GATEWAYS - {state["gateway"]["name"]}, "READY")


async def longest_request_s(cluster: LocalCluster, model: str, until: asyncio.Event) -> float:
    """Send requests on new connections, one after the other, and return the longest time. Raises if one fails."""
    longest_s = 0.0
    while not until.is_set():
        sent_s = time.monotonic()
        async with cluster.session() as http:
            assert (await chat(http, model, "hi", max_tokens=2)).error is None
        longest_s = max(longest_s, time.monotonic() - sent_s)
    return longest_s


def test_two_gateways_share_one_port_and_replace_each_other(tmp_path: Path, measured: Callable[[str], None]) -> None:
    model = write_tiny(tmp_path)

    async def scenario(cluster: LocalCluster) -> None:
        shared = await accepting(cluster, GATEWAYS)
        assert shared.keys() == GATEWAYS
        await check_common_answers(cluster, model.name)
        until = asyncio.Event()
        cluster.kill("gateway-1")
        # Connections that it had accepted are lost with it; later ones must not be.
        await asyncio.sleep(1.0)
        asking = asyncio.create_task(longest_request_s(cluster, model.name, until))
        killed = await accepting(cluster, GATEWAYS)
        assert killed.keys() == GATEWAYS, "the restarted gateway does not accept connections"
        until.set()
        longest_s = await asking
        measured(f"two gateways accepted {dict(shared)}; one killed: longest new request {longest_s:.2f} s")

    with LocalCluster(tmp_path / "data", "--model", str(model), "--engines", "1", "--gateways", "2") as running:
        asyncio.run(scenario(running))


def test_a_cluster_over_tcp_starts_serves_and_stops(tmp_path: Path) -> None:
    model = write_tiny(tmp_path)
    names = ("store", "planner", "monitor", "router", "engine-0", "gateway-0")
    peers = {name: ",".join(f"tcp://127.0.0.1:{free_port()}" for _ in range(2)) for name in names}
    flags = ["--set", f"bus.peers={json.dumps(peers)}"]
    # The template has no address for the supervisor and for scripts/restart, which only ask.
    flags += ["--set", "bus.connect=tcp://{name}:5570", "--set", "bus.connect_pub=tcp://{name}:5571"]

    async def scenario(cluster: LocalCluster) -> None:
        async with cluster.session() as http:
            assert (await chat(http, model.name, "hi", max_tokens=4)).error is None
        command = await asyncio.create_subprocess_exec(*cluster.command("restart", "router"))
        assert await command.wait() == 0
        async with cluster.session() as http:
            assert (await chat(http, model.name, "hi", max_tokens=4)).error is None

    with LocalCluster(tmp_path / "data", "--model", str(model), "--engines", "1", *flags) as running:
        asyncio.run(scenario(running))
