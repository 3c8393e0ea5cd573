"""Time as an argument: services hold a Clock, and pass the time as a number to decisions."""

import time
from typing import Protocol


class Clock(Protocol):
    def monotonic_s(self) -> float:
        """Seconds that never go backwards. Not comparable between machines or restarts."""

    def unix_s(self) -> float:
        """Seconds since 1970, for people and files."""


class SystemClock:
    def monotonic_s(self) -> float:
        return time.monotonic()

    def unix_s(self) -> float:
        return time.time()
