"""What happened to a request or an adapter, for people who debug. Pure and bounded."""

from collections import deque

KEPT_LINES = 4096


class Story:
    """The last few thousand events, by id."""

    def __init__(self) -> None:
        self._lines: deque[tuple[str, float, str]] = deque(maxlen=KEPT_LINES)

    def tell(self, subject: str, now: float, text: str) -> None:
        self._lines.append((subject, now, text))

    def of(self, subject: str) -> list[str]:
        """Lines about one id, oldest first, each with its time in seconds."""
        return [f"{now:.3f} {text}" for about, now, text in self._lines if about == subject]
