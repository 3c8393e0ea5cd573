"""The cells, outcomes and table of scripts/bench faults, and the bus that it disturbs."""

import asyncio
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from faulty.cells import Cell, Fault, all_cells, quick_cells
from faulty.results import figures, markdown, row, violations
from faulty.traffic import Case, Outcome, Request

from loraserve.bus.protocol import Envelope
from loraserve.errors import RequestTimeoutError
from loraserve.messages import Ping, Pong
from loraserve.testing.faults.bus import FaultyBus
from loraserve.testing.faults.shim import Shim
from loraserve.testing.memory_bus import MemoryNetwork

NAMES = ["store", "planner", "monitor", "router", "engine-0", "engine-1", "gateway-0"]
ENGINES = ["engine-0", "engine-1"]
CASE = Case("pirate", "hi", "yay")


def request(outcome: Outcome, engine: str = "engine-1", times_s: tuple[float, ...] = (1.0, 2.0)) -> Request:
    return Request(CASE, True, 0.0, outcome=outcome, why="because", engine=engine, times_s=[*times_s], ended_s=9.0)


def test_every_process_is_disturbed_in_every_way() -> None:
    cells = all_cells(NAMES)
    assert len(cells) >= 60
    assert len(set(cells)) == len(cells)
    for fault, seconds in ((Fault.KILL, 0.0), (Fault.TERM, 0.0), (Fault.STOP, 5.0), (Fault.STOP, 30.0)):
        targets = {cell.targets for cell in cells if (cell.fault, cell.seconds) == (fault, seconds)}
        assert targets == {*((name,) for name in NAMES), ("engine-0", "engine-1")}
    assert {cell.fault for cell in cells} == set(Fault)
    assert set(quick_cells()[1].targets) <= set(NAMES)


def test_failures_count_unless_the_fault_excuses_them() -> None:
    requests = [request(outcome) for outcome in Outcome]
    times_s, both = (1.5, 3.0, 4.0), ("engine-0", "engine-1")
    counts = {
        cell: row(cell, requests, ENGINES, times_s, ())
        for cell in (Cell(Fault.TERM, ("router",)), Cell(Fault.KILL, ("gateway-0",)), Cell(Fault.KILL, both))
    }
    assert [(each.failed, each.refused, each.cut, each.corrupted) for each in counts.values()] == [
        (3, 0, 0, 1),
        (2, 0, 1, 1),
        (2, 1, 0, 1),
    ]
    rows = list(counts.values())
    assert violations(rows, ENGINES) == 3 + 2 + 3
    assert figures(rows, ENGINES)["failed_with_an_engine"] == 5
    lost = row(Cell(Fault.NONE), [], ENGINES, times_s, ["LOST: operator-1 was loaded and is gone"])
    assert violations([lost], ENGINES) == 1


def test_gaps_are_those_of_streams_that_ran_when_the_fault_began() -> None:
    moved = request(Outcome.OK, "engine-0", (1.0, 4.0, 4.5))
    calm = request(Outcome.OK, "engine-1", (1.0, 1.5, 2.0))
    later = Request(CASE, True, 2.0, outcome=Outcome.OK, engine="engine-0", times_s=[3.0, 8.0], ended_s=8.0)
    found = row(Cell(Fault.KILL, ("engine-0",)), [moved, calm, later], ENGINES, (1.2, 1.3, 2.3), ())
    assert (found.moved_gap_s, found.gap_s, found.longest_wait_s) == (3.0, 1.75, 7.0)
    assert found.recovered_s == pytest.approx(1.0)
    assert "| kill -9 | engine-0 | 3 | 0 | 0 | 0 | 0 | 7.00 | 1.75 | 3.00 | 1.00 |" in markdown([found])


def run_bus(tmp_path: Path, messages: int, **shares: float) -> list[str]:
    """Return the names that a faulty process receives from 0, 1, 2, ... in this order."""

    async def scenario() -> list[str]:
        network = MemoryNetwork()
        control = Shim(Path(), tmp_path / "faults", Path())
        faulty = FaultyBus(network.bus("router", Ping | Pong), control, Random(1))
        sender = network.bus("engine-0", Ping)
        control.disturb_messages(**shares)
        received: list[str] = []

        async def listen() -> None:
            while True:
                received.append((await faulty.receive()).message.name)

        listening = asyncio.create_task(listen())
        for number in range(messages):
            message = Pong(name=str(number), state="READY", incarnation="", pid=0, protocol=0, detail="")
            sender.send("router", message)
            await asyncio.sleep(0)
        await asyncio.sleep(0.4)
        listening.cancel()
        await faulty.close()
        return received

    return asyncio.run(scenario())


def test_messages_are_lost_doubled_and_overtaken(tmp_path: Path) -> None:
    sent = [str(number) for number in range(200)]
    assert run_bus(tmp_path, 200) == sent
    lost = run_bus(tmp_path, 200, lost=0.2)
    assert 120 < len(lost) < 190
    assert lost == sorted(lost, key=int)
    doubled = Counter(run_bus(tmp_path, 200, doubled=0.2))
    assert set(doubled) == set(sent)
    assert 15 < sum(count == 2 for count in doubled.values()) < 80
    overtaken = run_bus(tmp_path, 200, delayed=0.2)
    assert sorted(overtaken, key=int) == sent
    assert overtaken != sent


def test_a_process_that_is_cut_off_hears_nothing_from_its_peer(tmp_path: Path) -> None:
    async def scenario() -> None:
        network = MemoryNetwork()
        control = Shim(Path(), tmp_path / "faults", Path())
        faulty = FaultyBus(network.bus("router", Ping), control, Random(1))
        one, other = network.bus("engine-0", Ping), network.bus("engine-1", Ping)

        async def answer() -> None:
            while True:
                envelope: Envelope = await faulty.receive()
                pong = Pong(name="router", state="READY", incarnation="", pid=0, protocol=0, detail="")
                faulty.respond(envelope, pong)

        answering = asyncio.create_task(answer())
        control.cut_off("engine-0", "store")
        with pytest.raises(RequestTimeoutError):
            await one.request("router", Ping(), Pong, 0.1)
        assert (await other.request("router", Ping(), Pong, 1.0)).name == "router"
        control.heal()
        assert (await one.request("router", Ping(), Pong, 1.0)).name == "router"
        answering.cancel()
        await faulty.close()

    asyncio.run(scenario())
