"""Limits how often later requests overtake a request that waits for room in the adapter pool.

A waiting request whose adapter is not in the pool is skipped, and later requests may start. New requests could keep the
resident adapters in use forever, and the skipped request would never run. After MAX_OVERTAKEN later requests have
started, the skipped request therefore reserves a place: a set of resident adapters whose eviction makes room. No new
request may start with these adapters, so they become evictable when their running requests end. Those requests may run
for long, so one more place is reserved after each further MAX_OVERTAKEN starts.
"""

from collections.abc import Callable

from loraserve.engine.schedule.sequence import Sequence
from loraserve.messages import AdapterRef

MAX_OVERTAKEN = 64
"""Number of later requests that may start before a skipped request reserves room in the pool."""


class OvertakingLimit:
    """Applies the limit during one pass over the waiting requests, in order of arrival.

    Only the first request over the limit reserves room. ``find_blocking(adapter, places)`` returns the versions in
    the ``places`` sets of resident adapters that are cheapest to evict for the adapter.
    """

    def __init__(self, find_blocking: Callable[[AdapterRef | None, int], frozenset[str]]) -> None:
        self._find_blocking = find_blocking
        self._skipped: list[Sequence] = []
        self._reserved: frozenset[str] | None = None

    def skip(self, sequence: Sequence) -> None:
        """Record that the request waits for its adapter, and reserve room if it was overtaken too often."""
        self._skipped.append(sequence)
        if self._reserved is None and sequence.overtaken >= MAX_OVERTAKEN:
            self._reserved = self._find_blocking(sequence.admit.adapter, sequence.overtaken // MAX_OVERTAKEN)

    def may_start(self, sequence: Sequence) -> bool:
        """Return False if the request's adapter occupies reserved room, else True."""
        return not self._reserved or sequence.version not in self._reserved

    def record_start(self, sequence: Sequence) -> None:
        """Count this start for all skipped requests. Base-model requests do not count, as they use no pool room."""
        if sequence.version:
            for other in self._skipped:
                other.overtaken += 1
