"""The system clock, a manual clock, and an event loop in virtual time."""

import asyncio
import time

import pytest

from loraserve.clock import LONGEST_GAP_S, Clock, RunningClock, SystemClock
from loraserve.testing.clock import DeadlockError, FakeClock, LoopClock, run_virtual


def test_the_system_clock_is_the_machine_s() -> None:
    clock: Clock = SystemClock()
    assert abs(clock.unix_s() - time.time()) < 1
    first = clock.monotonic_s()
    assert clock.monotonic_s() >= first


def test_the_running_clock_leaves_out_pauses() -> None:
    machine = FakeClock(monotonic_s=100.0)
    clock = RunningClock(machine.monotonic_s, machine.unix_s)
    for _ in range(20):
        machine.advance(0.1)
        clock.monotonic_s()
    assert clock.monotonic_s() == pytest.approx(102.0)
    machine.advance(30.0)
    assert clock.monotonic_s() == pytest.approx(102.0 + LONGEST_GAP_S)
    assert clock.paused_s == pytest.approx(30.0 - LONGEST_GAP_S)
    machine.advance(0.2)
    assert clock.monotonic_s() == pytest.approx(102.2 + LONGEST_GAP_S)


def test_steps_of_the_wall_clock_do_not_change_the_running_clock() -> None:
    machine, wall = FakeClock(), FakeClock()
    clock = RunningClock(machine.monotonic_s, wall.unix_s)
    for step_s in (3600.0, -7200.0):
        wall.advance(step_s)
        machine.advance(0.1)
        before = clock.monotonic_s()
        machine.advance(0.1)
        assert clock.monotonic_s() - before == pytest.approx(0.1)


def test_the_ticking_clock_counts_all_the_time_that_its_loop_runs() -> None:
    async def scenario() -> None:
        clock = RunningClock(asyncio.get_running_loop().time)
        ticking = asyncio.ensure_future(clock.tick())
        await asyncio.sleep(60.0)
        assert clock.monotonic_s() == pytest.approx(60.0)
        ticking.cancel()

    run_virtual(scenario())


def test_a_fake_clock_stands_until_it_is_turned() -> None:
    clock = FakeClock(monotonic_s=5.0, unix_s=100.0)
    assert (clock.monotonic_s(), clock.unix_s()) == (5.0, 100.0)
    clock.advance(2.5)
    assert (clock.monotonic_s(), clock.unix_s()) == (7.5, 102.5)


def test_an_hour_of_virtual_time_takes_none() -> None:
    seen: list[tuple[str, float]] = []

    async def tick(name: str, interval_s: float) -> None:
        clock = LoopClock()
        for _ in range(3):
            await asyncio.sleep(interval_s)
            seen.append((name, clock.monotonic_s()))

    async def main() -> str:
        await asyncio.gather(tick("slow", 1200.0), tick("quick", 1000.0))
        return "done"

    started_s = time.monotonic()
    assert run_virtual(main()) == "done"
    assert time.monotonic() - started_s < 5
    expected = [("quick", 1000), ("slow", 1200), ("quick", 2000), ("slow", 2400), ("quick", 3000), ("slow", 3600)]
    assert [(name, round(at)) for name, at in seen] == expected


def test_waiting_for_nothing_is_an_error() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(DeadlockError, match="no timer is set"):
        run_virtual(main())
