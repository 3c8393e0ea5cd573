"""The clocks of a service. A service reads the time from its Clock and passes it as a number to decision functions."""

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

LONGEST_GAP_S = 0.5
"""Longest time between two readings of a RunningClock that counts in full."""
TICK_S = 0.1


class Clock(Protocol):
    def monotonic_s(self) -> float:
        """Return seconds that never decrease. Values of different machines or boots are not comparable."""

    def unix_s(self) -> float:
        """Return the seconds since 1970, for logs and files."""


def unix_offset_s(clock: Clock) -> float:
    """Return the seconds to add to a monotonic time of ``clock`` to get the wall-clock time."""
    return clock.unix_s() - clock.monotonic_s()


class SystemClock:
    def monotonic_s(self) -> float:
        return time.monotonic()

    def unix_s(self) -> float:
        return time.time()


class RunningClock:
    """A clock that leaves out the time in which its process was stopped or its event loop was blocked.

    After a pause, the messages of other processes wait in the inbox. If the pause counted, these processes would seem
    silent for its whole length, and the service would declare them dead before it reads their messages.

    ``tick`` must run in the event loop: it reads the clock every TICK_S. A longer gap than LONGEST_GAP_S between two
    readings is a pause, of which only LONGEST_GAP_S counts.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic, unix: Callable[[], float] = time.time) -> None:
        self._monotonic = monotonic
        self._unix = unix
        self._read_s = monotonic()
        self.paused_s = 0.0
        """Total time left out."""

    def monotonic_s(self) -> float:
        now = self._monotonic()
        self.paused_s += max(0.0, now - self._read_s - LONGEST_GAP_S)
        self._read_s = now
        return now - self.paused_s

    def unix_s(self) -> float:
        return self._unix()

    async def tick(self) -> None:
        while True:
            self.monotonic_s()
            await asyncio.sleep(TICK_S)
