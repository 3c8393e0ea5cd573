"""Starts the prefill of a request before its adapter has been read completely.

A prefill uses the layers of an adapter one after the other, and a read delivers the layers in the same order. If the
read should end well before the step, both can run at the same time. The step's result is used only if the read has been
verified when the step is done. Otherwise the request starts again. No token computed with an unverified adapter is
ever sent.
"""

from collections.abc import Callable, Iterable
from math import ceil

from loraserve.engine.adapters.lifecycle import WANTED_LOADS, AnnouncedRead
from loraserve.engine.adapters.pool import AdapterPool
from loraserve.engine.schedule.sequence import EARLY, ENDING, Sequence
from loraserve.messages import MeasuredSpeed

MARGIN = 1.5
"""Safety factor on the remaining read time, because a discarded early start wastes a whole step."""
SLACK_S = 0.002
MIN_GAIN_S = 0.003
"""Minimum remaining read time for an early start. Verification slows the step, which cancels a smaller gain."""


def remaining_read_s(expected_s: float, elapsed_s: float, fraction: float) -> float:
    """Return the estimated seconds until a read is verified.

    The read was expected to take ``expected_s`` seconds. In ``elapsed_s`` seconds it has delivered ``fraction`` of the
    slab (above 0). The estimate is the larger of the rest of ``expected_s`` and the time at the average speed so far.
    """
    return max(expected_s - elapsed_s, elapsed_s * (1 - fraction) / fraction)


def min_prefill_tokens(remaining_s: float, measured: MeasuredSpeed) -> int | None:
    """Return the minimum prefill tokens of a step that lasts until the read is verified, in ``remaining_s`` seconds.

    The time of a prefill step is assumed to be proportional to its tokens. Returns 1 if a decode step is long enough.
    Returns None if an average prefill step is too short, or if the remaining time is below MIN_GAIN_S.
    """
    if remaining_s < MIN_GAIN_S:
        return None
    needed_s = MARGIN * remaining_s + SLACK_S
    if measured.decode_step_s >= needed_s:
        return 1
    prefill = measured.prefill_step
    if prefill is None or prefill.duration_s < needed_s:
        return None
    return max(1, ceil(prefill.prefill_tokens * needed_s / prefill.duration_s))


class EarlyStarts:
    """Decides which requests may start early, and whether the results of their steps are used.

    The pool entry of an adapter records the adapter's current read. A slab may be read several times before it is
    verified, so each read has its own number. Numbers start at 1. The number 0 means that no read was announced.
    """

    def __init__(self, pool: AdapterPool) -> None:
        self._pool = pool
        self.started = 0
        self.discarded = 0

    def announce_read(self, version: str, read: int, least_tokens: int | None) -> None:
        """Record the current read of a loading adapter (see AdapterArriving). Ignores cancelled loads."""
        entry = self._pool.get(version)
        if entry is not None and entry.state in WANTED_LOADS:
            entry.announce_read(read, least_tokens)

    def can_start(self, sequence: Sequence, first_tokens: Callable[[Sequence], int]) -> bool:
        """Return whether the request may start early. ``first_tokens`` returns the token count of its first step."""
        read = self._announced(sequence.version)
        if read is None or read.failed_once or read.least_tokens is None:
            return False
        return first_tokens(sequence) >= read.least_tokens

    def start(self, version: str) -> int:
        """If the adapter is still being read, count an early start and return the read's number. Else, return 0."""
        read = self._announced(version)
        if read is None:
            return 0
        self.started += 1
        return read.number

    def is_valid(self, sequence: Sequence, late: bool) -> bool:
        """Return whether the result of the sequence's completed step may be used.

        Always True if the sequence did not start early. Returning False increments ``discarded``. ``late`` is true if
        the runner computed a layer before that layer had been read.
        """
        if not sequence.early_read:
            return True
        started_with, sequence.early_read = sequence.early_read, 0
        entry = self._pool.get(sequence.version)
        if not late and entry is not None and entry.is_complete and entry.verified_read == started_with:
            return True
        self.discarded += 1
        current = self._announced(sequence.version)
        if current is not None and current.number == started_with:
            current.failed_once = True
        return False

    def validate(self, running: Iterable[Sequence]) -> None:
        """Raise AssertionError if the states of requests and adapters disagree about early starts."""
        for sequence in running:
            entry = self._pool.get(sequence.version) if sequence.version else None
            has_adapter = entry is None or entry.is_complete
            assert has_adapter or sequence.state in (EARLY, ENDING), "a request runs without its adapter"
            assert sequence.state is not EARLY or sequence.early_read, "an early start without a read"
            assert not sequence.early_read or sequence.state in (EARLY, ENDING), "a read of a request that runs"
            assert not sequence.early_read or sequence.in_flight == 1, "an early start is not in exactly one step"

    def _announced(self, version: str) -> AnnouncedRead | None:
        entry = self._pool.get(version)
        return entry.announced if entry is not None else None
