"""Who waits for room in the pool while others overtake it, and what must then run out. Pure."""

from collections.abc import Callable

from loraserve.engine.schedule.sequence import Sequence
from loraserve.messages import AdapterRef

MOST_BYPASSED = 64
"""Requests that may overtake one which waits for room in the pool, before no more begin with adapters in its way."""


class Bypass:
    """One look at the waiting, in order of arrival. ``in_the_way`` says what has to leave for an adapter.

    For the first who was passed by too often one place in the pool is left to run out, so that all the others go on;
    and one more whenever it was passed by as often again, as what runs in the first may run for long.
    """

    def __init__(self, in_the_way: Callable[[AdapterRef | None, int], frozenset[str]]) -> None:
        self._in_the_way = in_the_way
        self._passed: list[Sequence] = []
        self._closed: frozenset[str] | None = None

    def passes(self, sequence: Sequence) -> None:
        """It waits for its adapter: those behind it may go first."""
        self._passed.append(sequence)
        if self._closed is None and sequence.bypassed >= MOST_BYPASSED:
            self._closed = self._in_the_way(sequence.admit.adapter, sequence.bypassed // MOST_BYPASSED)

    def holds_up(self, sequence: Sequence) -> bool:
        """It would begin with an adapter that has to run out."""
        return sequence.version in (self._closed or ())

    def began(self, sequence: Sequence) -> None:
        for other in self._passed:
            other.bypassed += bool(sequence.version)
