"""Decides which client connections a stopping gateway may close. Pure.

A client may send its next request at any time on a connection that it keeps alive. If the gateway closed the connection
at that moment, the request would fail. So a draining gateway still answers on open connections, and asks clients with
``Connection: close`` to open another one, which another gateway accepts. Only connections that stayed idle for
IDLE_GRACE_S are closed, because their clients rarely use them.
"""

from collections import Counter
from collections.abc import Hashable, Iterable
from typing import TypeVar

IDLE_GRACE_S = 2.0

C = TypeVar("C", bound=Hashable)


class Connections:
    """Counts the HTTP requests in progress by connection. Keeps idle times only during the drain."""

    def __init__(self) -> None:
        self._requests: Counter[Hashable] = Counter()
        self._draining_since_s: float | None = None
        self._idle_since_s: dict[Hashable, float] = {}

    @property
    def is_draining(self) -> bool:
        return self._draining_since_s is not None

    @property
    def requests(self) -> int:
        """The number of requests in progress on all connections."""
        return self._requests.total()

    def drain(self, now: float) -> None:
        self._draining_since_s = now

    def begin(self, connection: Hashable) -> None:
        self._requests[connection] += 1

    def end(self, connection: Hashable, now: float) -> None:
        self._requests[connection] -= 1
        if not self._requests[connection]:
            del self._requests[connection]
            if self.is_draining:
                self._idle_since_s[connection] = now

    def closable(self, connections: Iterable[C], now: float) -> list[C]:
        """Return those of the open ``connections`` that were idle for IDLE_GRACE_S of the drain."""
        if self._draining_since_s is None:
            return []
        since_s = self._draining_since_s
        idle = [connection for connection in connections if connection not in self._requests]
        return [c for c in idle if now - self._idle_since_s.get(c, since_s) >= IDLE_GRACE_S]
