"""A bounded record of recent events of requests and adapters, for operators and test failures."""

from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import NamedTuple

from loraserve.messages import StoryLine

MAX_SUBJECTS = 8192
MAX_ENTRIES = 64
CLOCK_STEP_S = 0.01
"""Smaller changes of the offset between the two clocks are noise. Larger ones are changes of the wall clock."""


class StoryEntry(NamedTuple):
    """One event. ``time_s`` is a time of the process's monotonic clock."""

    time_s: float
    text: str


class Story:
    """Keeps the last ``MAX_ENTRIES`` events of each of the ``MAX_SUBJECTS`` subjects with the most recent events.

    A subject is a request id, an adapter name or an adapter version.
    """

    def __init__(self) -> None:
        self._subjects: OrderedDict[str, deque[StoryEntry]] = OrderedDict()
        self._to_unix_s = 0.0

    def tell(self, subject: str, now: float, text: str) -> None:
        """Record an event at the monotonic time ``now``."""
        entries = self._subjects.setdefault(subject, deque(maxlen=MAX_ENTRIES))
        self._subjects.move_to_end(subject)
        entries.append(StoryEntry(now, text))
        if len(self._subjects) > MAX_SUBJECTS:
            self._subjects.popitem(last=False)

    def entries(self, subject: str) -> list[StoryEntry]:
        """Return the events of a subject, oldest first."""
        return list(self._subjects.get(subject, ()))

    def lines(self, subject: str) -> list[str]:
        """Return the events of a subject as text, each with its monotonic time in seconds."""
        return [f"{time_s:.3f} {text}" for time_s, text in self.entries(subject)]

    def told(self, subjects: Sequence[str], monotonic_to_unix_s: float) -> tuple[StoryLine, ...]:
        """Return the events with wall-clock times. Ignores changes of the offset by up to CLOCK_STEP_S."""
        if abs(monotonic_to_unix_s - self._to_unix_s) > CLOCK_STEP_S:
            self._to_unix_s = monotonic_to_unix_s
        return tuple(
            StoryLine(unix_s=time_s + self._to_unix_s, subject=subject, text=text)
            for subject in subjects
            for time_s, text in self.entries(subject)
        )
