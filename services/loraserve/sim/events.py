"""Discrete events: what is due when, and the time that goes with it. Pure."""

from collections.abc import Callable
from heapq import heappop, heappush

Happens = Callable[[float], None]
"""Called with the time at which it happens."""


class Timeline:
    """Things happen in order of their time, and in the order in which they were set where that is the same."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Happens]] = []
        self._set = 0
        self.now_s = 0.0

    def at(self, time_s: float, happens: Happens) -> None:
        self._set += 1
        heappush(self._due, (time_s, self._set, happens))

    def next(self) -> bool:
        """Let the next thing happen; False where there is none."""
        if not self._due:
            return False
        self.now_s, _, happens = heappop(self._due)
        happens(self.now_s)
        return True
