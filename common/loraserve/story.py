"""What happened to requests and adapters, for operators and for failing tests. Pure and bounded."""

from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import NamedTuple

from loraserve.messages import StoryLine

MAX_SUBJECTS = 8192
MAX_ENTRIES = 64
CLOCK_STEP_S = 0.01
"""Smaller differences between two readings of the clocks are no change of the wall clock."""


class StoryEntry(NamedTuple):
    """One event; ``time_s`` is of the process's monotonic clock."""

    time_s: float
    text: str


class Story:
    """The latest events of each subject: a request id, an adapter name or an adapter version.

    Keeps the last ``MAX_ENTRIES`` events of the ``MAX_SUBJECTS`` subjects that had an event most recently.
    """

    def __init__(self) -> None:
        self._subjects: OrderedDict[str, deque[StoryEntry]] = OrderedDict()
        self._to_unix_s = 0.0

    def tell(self, subject: str, now: float, text: str) -> None:
        """Append an event."""
        entries = self._subjects.setdefault(subject, deque(maxlen=MAX_ENTRIES))
        self._subjects.move_to_end(subject)
        entries.append(StoryEntry(now, text))
        if len(self._subjects) > MAX_SUBJECTS:
            self._subjects.popitem(last=False)

    def entries(self, subject: str) -> list[StoryEntry]:
        """Return the events of a subject, oldest first."""
        return list(self._subjects.get(subject, ()))

    def lines(self, subject: str) -> list[str]:
        """Return the events of a subject as text, each with its time in seconds."""
        return [f"{time_s:.3f} {text}" for time_s, text in self.entries(subject)]

    def told(self, subjects: Sequence[str], monotonic_to_unix_s: float) -> tuple[StoryLine, ...]:
        """Return the events of several subjects with wall-clock times, which are the same in every answer."""
        if abs(monotonic_to_unix_s - self._to_unix_s) > CLOCK_STEP_S:
            self._to_unix_s = monotonic_to_unix_s
        return tuple(
            StoryLine(unix_s=time_s + self._to_unix_s, subject=subject, text=text)
            for subject in subjects
            for time_s, text in self.entries(subject)
        )
