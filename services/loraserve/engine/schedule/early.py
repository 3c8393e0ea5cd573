"""Requests that begin before the last of their adapter is there: which may, and whether it came in time. Pure.

A prefill takes its layers one after the other, and so does a read: where the rest of a slab is expected well before the
step that uses it ends, they go on side by side. What such a step brings counts only if the very read that it began with
has been verified by then, and else the request begins anew: nothing is ever told of what was not verified.
"""

from collections.abc import Callable, Iterable
from math import ceil

import msgspec

from loraserve.engine.adapters.pool import AdapterPool
from loraserve.engine.schedule.report import Measured
from loraserve.engine.schedule.sequence import LEAVING, Sequence

MARGIN = 1.5
"""What is left of a read is reckoned so many times as long: to begin too early costs a whole step."""
SLACK_S = 0.002
LEAST_GAIN_S = 0.003
"""What is there sooner is waited for: verifying beside the step takes some of what would be gained."""


def rest_s(expected_s: float, elapsed_s: float, landed: float) -> float:
    """Seconds until a read is verified, of which the share ``landed``, above 0, came in ``elapsed_s``: by what its way
    has shown, or by its own pace where that is slower."""
    return max(expected_s - elapsed_s, elapsed_s * (1 - landed) / landed)


def least_tokens(left_s: float, measured: Measured) -> int | None:
    """Prefill tokens whose step lasts at least until a slab is verified that is in ``left_s``; None where no step is
    known to, or where it does not pay. Of steps with more tokens than usual it is only believed that they take no less
    time."""
    if left_s < LEAST_GAIN_S:
        return None
    needed_s = MARGIN * left_s + SLACK_S
    if measured.decode_step_s >= needed_s:
        return 1
    prefill = measured.prefill_step
    if prefill is None or prefill.duration_s < needed_s:
        return None
    return max(1, ceil(prefill.prefill_tokens * needed_s / prefill.duration_s))


class _Read(msgspec.Struct):
    """The read under way of an adapter. ``given_up``: a step that began with it came to nothing."""

    number: int
    least_tokens: int | None
    given_up: bool = False


class EarlyStarts:
    """Reads are told apart by numbers, as one slab may take several; 0 is none that anybody can have begun with."""

    def __init__(self, pool: AdapterPool) -> None:
        self._pool = pool
        self._reads: dict[str, _Read] = {}
        self.begun = 0
        self.in_vain = 0

    def arriving(self, version: str, read: int, tokens: int | None) -> None:
        """A step of at least so many tokens lasts until the adapter is there; None: no step is worth it."""
        known = self._reads.get(version)
        if known is not None and known.number == read:
            known.least_tokens = tokens
        elif self._pool.arrives(version):
            self._reads[version] = _Read(read, tokens)

    def over(self, version: str, read: int = 0) -> None:
        """Its load is: verified as ``read``, or failed."""
        self._reads.pop(version, None)
        entry = self._pool.get(version)
        assert entry is not None, "it was loading"
        entry.read = read

    def may_begin(self, sequence: Sequence, first_tokens: Callable[[Sequence], int]) -> bool:
        """Before its adapter is there; its first step computes so many tokens."""
        read = self._reads.get(sequence.version)
        if read is None or read.given_up or read.least_tokens is None or not self._pool.arrives(sequence.version):
            return False
        return first_tokens(sequence) >= read.least_tokens

    def begin(self, sequence: Sequence) -> None:
        """It begins; if its adapter is not there, with the read under way."""
        read = self._reads.get(sequence.version)
        sequence.read = read.number if read is not None else 0
        self.begun += read is not None

    def came(self, sequence: Sequence, late: bool) -> bool:
        """Whether its step is of any use; ``late`` where the runner did not find all layers."""
        if not sequence.read:
            return True
        read, sequence.read = sequence.read, 0
        entry = self._pool.get(sequence.version)
        if not late and entry is not None and entry.resident and entry.read == read:
            return True
        self.in_vain += 1
        known = self._reads.get(sequence.version)
        if known is not None and known.number == read:
            known.given_up = True
        return False

    def begun_with(self, version: str, running: Iterable[Sequence]) -> list[Sequence]:
        """Who counts on a read of it, of those that have not ended."""
        return [s for s in running if s.version == version and s.read and s.state is not LEAVING]

    def validate(self, running: Iterable[Sequence]) -> None:
        """Nobody runs without its adapter but who began with a read of it and is in that step."""
        for sequence in running:
            entry = self._pool.get(sequence.version) if sequence.version else None
            assert entry is None or entry.resident or sequence.read or sequence.state is LEAVING, "runs on nothing"
            assert not sequence.read or sequence.in_flight == 1, "began early and is in no step"
        loading = {entry.adapter.version for entry in self._pool.entries() if not entry.resident}
        assert self._reads.keys() <= loading, "a read of nothing that loads"
