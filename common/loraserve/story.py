"""What happened to requests and adapters, for operators and for failing tests. Pure and bounded."""

from collections import OrderedDict, deque
from typing import NamedTuple

MAX_SUBJECTS = 8192
MAX_ENTRIES = 64


class StoryEntry(NamedTuple):
    """One event. ``what`` is rendered with str() when the story is read, which may be never."""

    time_s: float
    what: object


class Story:
    """The latest events of each subject: a request id, an adapter name or an adapter version.

    Keeps the last ``MAX_ENTRIES`` events of the ``MAX_SUBJECTS`` subjects that had an event most recently.
    """

    def __init__(self) -> None:
        self._subjects: OrderedDict[str, deque[StoryEntry]] = OrderedDict()

    def tell(self, subject: str, now: float, what: object) -> None:
        """Append an event."""
        entries = self._subjects.get(subject)
        if entries is None:
            entries = self._subjects[subject] = deque(maxlen=MAX_ENTRIES)
            if len(self._subjects) > MAX_SUBJECTS:
                self._subjects.popitem(last=False)
        else:
            self._subjects.move_to_end(subject)
        entries.append(StoryEntry(now, what))

    def entries(self, subject: str) -> list[StoryEntry]:
        """Return the events of a subject, oldest first."""
        return list(self._subjects.get(subject, ()))

    def lines(self, subject: str) -> list[str]:
        """Return the events of a subject as text, each with its time in seconds."""
        return [f"{time_s:.3f} {what}" for time_s, what in self.entries(subject)]
