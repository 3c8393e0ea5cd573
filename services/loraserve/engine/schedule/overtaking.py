"""Limits how often a request that waits for room in the adapter pool is overtaken by later requests.

A waiting request whose adapter is not in the pool is skipped, and later requests may start. Without a limit it could
wait for ever: each adapter in the pool can be kept in use by new requests for it. A request that was overtaken
MAX_OVERTAKEN times therefore reserves the pool entries that stand in its adapter's way: no further request may start
with those adapters, so that they become evictable once their running requests end. One more place in the pool is
reserved after each further MAX_OVERTAKEN times, as the requests that use the first place may run for long.
"""

from collections.abc import Callable

from loraserve.engine.schedule.sequence import Sequence
from loraserve.messages import AdapterRef

MAX_OVERTAKEN = 64
"""Requests that may overtake one which waits for its adapter, before it reserves room in the pool."""


class OvertakingLimit:
    """One pass over the waiting requests in order of arrival. Only the first request that is due reserves room.

    ``find_blocking(adapter, places)`` returns the versions that have to leave the pool before the adapter fits.
    """

    def __init__(self, find_blocking: Callable[[AdapterRef | None, int], frozenset[str]]) -> None:
        self._find_blocking = find_blocking
        self._skipped: list[Sequence] = []
        self._reserved: frozenset[str] | None = None

    def skip(self, sequence: Sequence) -> None:
        """Note that this request waits for its adapter while later ones may start."""
        self._skipped.append(sequence)
        if self._reserved is None and sequence.overtaken >= MAX_OVERTAKEN:
            self._reserved = self._find_blocking(sequence.admit.adapter, sequence.overtaken // MAX_OVERTAKEN)

    def may_start(self, sequence: Sequence) -> bool:
        """Return whether the request's adapter is not one that has to leave for an overtaken request."""
        return not self._reserved or sequence.version not in self._reserved

    def record_start(self, sequence: Sequence) -> None:
        """Count a start that overtook the requests skipped before it. Requests for the base model use no pool room."""
        if sequence.version:
            for other in self._skipped:
                other.overtaken += 1
