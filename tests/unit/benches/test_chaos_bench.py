"""The requests, checks and counts of scripts/bench chaos."""

import asyncio
import json
import mmap
import os
from random import Random
from typing import Any

import aiohttp
import msgspec
from aiohttp import web
from chaotic.cluster import Victims
from chaotic.counts import FAULTS, Counts
from chaotic.routing import Routing
from chaotic.traffic import Traffic
from chaotic.truth import Case, distinct
from harness.peer_memory import DAMAGED_BYTES, flip, held_by, left_of, mapped_by

from loraserve.messages import (
    AdapterRef,
    Admit,
    Admitted,
    Route,
    Routed,
    SamplingParams,
    ToEngine,
    ToGateway,
    ToRouter,
)
from loraserve.testing.memory_bus import MemoryBus, MemoryNetwork
from loraserve.transfer.shm import SharedMemory

CASE = Case("pirate", (1, 2), (5, 6, 7), "yay")


def counted(free_port: int, events: list[dict[str, Any]], status: int = 200, deadline_s: float = 30.0) -> Counts:
    """Return the counts of one request to a gateway that sends ``events``."""
    counts = Counts()

    async def answer(http: web.Request) -> web.StreamResponse:
        body = await http.json()
        assert (body["model"], body["prompt"], body["max_tokens"]) == ("pirate", [1, 2], 3)
        response = web.StreamResponse(status=status)
        await response.prepare(http)
        for event in events:
            if event.get("hangs"):
                await asyncio.sleep(deadline_s * 10)
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        return response

    async def scenario() -> None:
        app = web.Application()
        app.add_routes([web.post("/v1/completions", answer)])
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", free_port).start()
        network = MemoryNetwork()
        victims = Victims(None, None, {"pirate": None}, counts)  # type: ignore[arg-type, dict-item]
        routing = Routing(network.bus("router", ToRouter), victims, Random(0))
        async with aiohttp.ClientSession(f"http://127.0.0.1:{free_port}") as http:
            await Traffic(http, routing, [CASE], Random(0), counts).serve(CASE, deadline_s=deadline_s)
        await runner.cleanup()

    asyncio.run(scenario())
    return counts


def piece(text: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"text": text, "finish_reason": finish}]}


def faults(counts: Counts) -> dict[str, int]:
    return {name: count for name, count in counts.faults().items() if count}


def test_a_right_text_is_no_fault(free_port: int) -> None:
    counts = counted(free_port, [piece("ya"), piece("y", "length")])
    assert (counts.requests, counts.tokens, faults(counts)) == (1, 3, {})


def test_wrong_texts_are_counted_also_of_unfinished_requests(free_port: int) -> None:
    assert faults(counted(free_port, [piece("yes", "length")])) == {"wrong_texts": 1}
    error = {"error": {"message": "the engine died"}}
    assert faults(counted(free_port, [piece("ya"), error])) == {"failed_requests": 1}
    assert faults(counted(free_port, [piece("no"), error])) == {"failed_requests": 1, "wrong_texts": 1}


def test_refused_cut_and_stuck_requests_are_faults(free_port: int) -> None:
    assert faults(counted(free_port, [], status=503)) == {"failed_requests": 1}
    assert faults(counted(free_port, [piece("ya")])) == {"failed_requests": 1}
    stuck = counted(free_port, [piece("ya"), {"hangs": True}], deadline_s=0.3)
    assert faults(stuck) == {"stuck_requests": 1}


def test_a_migrated_request_goes_to_another_engine() -> None:
    """The engines are buses that admit requests; engine-0 refuses."""
    victims = Victims(None, None, {"pirate": None}, Counts())  # type: ignore[arg-type, dict-item]
    victims.usable = {"engine-0", "engine-1", "engine-2"}

    async def admit(bus: MemoryBus, admitted: list[Admit]) -> None:
        while True:
            envelope = await bus.receive()
            if isinstance(envelope.message, Admit):
                admitted.append(envelope.message)
                request_id = envelope.message.request_id
                ok = bus.name != "engine-0"
                bus.respond(envelope, Admitted(request_id=request_id, incarnation=bus.name, ok=ok))

    async def scenario() -> None:
        network = MemoryNetwork()
        routing = Routing(network.bus("router", ToRouter), victims, Random(0))
        gateway = network.bus("gateway-0", ToGateway)
        admitted: list[Admit] = []
        tasks = [asyncio.create_task(routing.listen())]
        tasks += [asyncio.create_task(admit(network.bus(name, ToEngine), admitted)) for name in sorted(victims.usable)]
        routing.expect(7, "engine-0")
        sampling = SamplingParams(max_tokens=3, seed=7)
        adapter = AdapterRef(name="pirate", version="v", rank=8, slab_bytes=1)
        route = Route(request_id="a-0", gateway="gateway-0", prompt_tokens=(1, 2), sampling=sampling, adapter=adapter)
        victims.poisoned = {("engine-2", "pirate")}
        assert (await gateway.request("router", route, Routed, 5.0)).engine == "engine-1", "engine-0 refused"
        assert routing.may_run(("engine-1", "pirate"))
        victims.poisoned = set()
        again = msgspec.structs.replace(
            route, request_id="a-0.1", prompt_tokens=(1, 2, 5), generated=1, avoid=("engine-1", "engine-0")
        )
        assert (await gateway.request("router", again, Routed, 5.0)).engine == "engine-2"
        assert (admitted[-1].generated, admitted[-1].prompt_tokens) == (1, (1, 2, 5))
        assert routing.migrations == 1
        routing.forget(7)
        assert not routing.may_run(("engine-2", "pirate"))
        for task in tasks:
            task.cancel()

    asyncio.run(scenario())


def test_a_corrupted_copy_is_not_requested_from_its_owner() -> None:
    victims = Victims(None, None, {}, Counts())  # type: ignore[arg-type]
    victims.usable = {"engine-0", "engine-1"}
    victims.poisoned = {("engine-0", "pirate")}
    assert victims.askable("pirate") == ["engine-1"]
    assert victims.askable("json") == ["engine-0", "engine-1"]


def test_prompts_with_equal_outputs_of_two_adapters_are_left_out() -> None:
    same = Case("json", CASE.prompt, CASE.tokens)
    other = Case("french", CASE.prompt, (8,))
    assert distinct([CASE, same, other]) == [other]


def test_every_fault_is_a_count_and_shown() -> None:
    counts = Counts(stuck_requests=3)
    counts.note("one was stuck")
    assert set(FAULTS) <= set(counts.figures())
    assert counts.faults()["stuck_requests"] == 3
    assert "one was stuck" in counts.text()


def test_memory_is_corrupted_at_the_given_offsets_only() -> None:
    # Of a size that no other memory of this process has.
    length = 301 * mmap.PAGESIZE
    memory = SharedMemory(length)
    try:
        memory.view[:] = bytes([5]) * len(memory.view)
        assert flip(os.getpid(), length, [1000])
        damaged = [place for place, byte in enumerate(memory.view) if byte != 5]
        assert damaged == list(range(1000, 1000 + DAMAGED_BYTES))
        assert not flip(os.getpid(), length + mmap.PAGESIZE, [0])
        assert memory.name in held_by(os.getpid()) & mapped_by(os.getpid())
        assert left_of({memory.name, "another"}) == {memory.name}
    finally:
        memory.view.release()
        memory.close()
