"""The clocks of a service. A service reads the time from its Clock and passes it as a number to decision functions."""

import time
from typing import Protocol


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
