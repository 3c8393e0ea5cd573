"""Early starts: requests whose prefill begins before their adapter has been read completely.

A prefill uses the layers of an adapter one after the other, and a read delivers them in the same order. If the rest of
a slab is expected well before the end of the step that uses it, both can run at the same time. The step's result
counts only if the read that it started with has been verified when the step is done. Otherwise the request starts
again, so that no token is ever sent that was computed with an unverified adapter.
"""

from collections.abc import Callable, Iterable
from math import ceil

from loraserve.engine.adapters.lifecycle import WANTED_LOADS, AnnouncedRead
from loraserve.engine.adapters.pool import AdapterPool
from loraserve.engine.schedule.sequence import EARLY, ENDING, Sequence
from loraserve.messages import MeasuredSpeed

MARGIN = 1.5
"""Factor on the expected rest of a read: an early start that comes to nothing costs a whole step."""
SLACK_S = 0.002
MIN_GAIN_S = 0.003
"""A shorter rest is waited for: verifying the slab beside the step takes part of what would be gained."""


def remaining_read_s(expected_s: float, elapsed_s: float, fraction: float) -> float:
    """Estimate the seconds until a read is verified.

    The read was expected to take ``expected_s``, and has delivered the ``fraction`` (above 0) of the slab in
    ``elapsed_s``. The estimate follows the slower of the expectation and the read's own pace.
    """
    return max(expected_s - elapsed_s, elapsed_s * (1 - fraction) / fraction)


def min_prefill_tokens(remaining_s: float, measured: MeasuredSpeed) -> int | None:
    """Return the least number of prefill tokens whose step lasts until a read with ``remaining_s`` left is verified.

    None if no step is known to last as long, or if starting early does not pay. A step with more tokens than the
    average one is only assumed to take no less time than that.
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
    """Decides which requests may start early, and whether their steps count.

    The current read of an adapter is kept in its entry in the pool. Each read has its own number, as a slab may be read
    several times before it is verified. No request can start early with read 0.
    """

    def __init__(self, pool: AdapterPool) -> None:
        self._pool = pool
        self.started = 0
        self.discarded = 0

    def announce_read(self, version: str, read: int, least_tokens: int | None) -> None:
        """Note the current read of an adapter that is loading; see AdapterArriving. A cancelled load is ignored."""
        entry = self._pool.get(version)
        if entry is not None and entry.state in WANTED_LOADS:
            entry.announce_read(read, least_tokens)

    def can_start(self, sequence: Sequence, first_tokens: Callable[[Sequence], int]) -> bool:
        """Return whether the request may start with the current read; its first step computes ``first_tokens``."""
        read = self._announced(sequence.version)
        if read is None or read.failed_once or read.least_tokens is None:
            return False
        return first_tokens(sequence) >= read.least_tokens

    def start(self, version: str) -> int:
        """Return the number of the read that a request starts early with; 0 if its adapter is not being read."""
        read = self._announced(version)
        if read is None:
            return 0
        self.started += 1
        return read.number

    def is_valid(self, sequence: Sequence, late: bool) -> bool:
        """Return whether the sequence's completed step counts; a step that did not start early always does.

        ``late`` says that the runner computed some layer before it had been read.
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
        """Raise AssertionError if a request runs without its adapter and did not start early."""
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
