"""Time as an argument: what code that needs a clock is given. The real one is in system_clock.py."""

from typing import Protocol


class Clock(Protocol):
    def monotonic_s(self) -> float:
        """Seconds that only grow, from an arbitrary start."""

    def unix_s(self) -> float:
        """Seconds since 1970 in UTC."""
