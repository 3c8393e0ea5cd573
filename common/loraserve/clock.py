"""Time as an argument: services hold a Clock; decisions receive a number."""

import time
from typing import Protocol


class Clock(Protocol):
    def monotonic_s(self) -> float:
        """Seconds that only grow; meaningless between machines and restarts."""

    def unix_s(self) -> float:
        """Seconds since 1970, for people and files."""


class SystemClock:
    def monotonic_s(self) -> float:
        return time.monotonic()

    def unix_s(self) -> float:
        return time.time()
