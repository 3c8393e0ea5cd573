"""Messages for a peer that is not connected."""

from collections import deque

from loraserve.bus.wire import Parts


class Backlog:
    """In order, bounded. Kept here and not in the socket so that a request which timed out can be taken back."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._parts: deque[Parts] = deque()

    def __len__(self) -> int:
        return len(self._parts)

    def add(self, parts: Parts) -> bool:
        """False when it is full."""
        if len(self._parts) >= self._limit:
            return False
        self._parts.append(parts)
        return True

    def withdraw(self, correlation: bytes) -> None:
        self._parts = deque(parts for parts in self._parts if parts[1] != correlation)

    def take_all(self) -> list[Parts]:
        taken = list(self._parts)
        self._parts.clear()
        return taken
