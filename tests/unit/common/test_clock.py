"""The system clock, a manual clock, and an event loop in virtual time."""

import asyncio
import time

import pytest

from loraserve.clock import Clock, SystemClock
from loraserve.testing.clock import DeadlockError, FakeClock, LoopClock, run_virtual


def test_the_system_clock_is_the_machine_s() -> None:
    clock: Clock = SystemClock()
    assert abs(clock.unix_s() - time.time()) < 1
    first = clock.monotonic_s()
    assert clock.monotonic_s() >= first


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
