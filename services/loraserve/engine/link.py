"""How much of the time that loads overlap belongs to each. Pure."""


class SharedLink:
    """While n loads are under way, each has 1/n of every second: a load's own time is what it would take alone.

    Whoever reckons with the result counts the loads before it itself, and would count them twice.
    """

    def __init__(self) -> None:
        self._loads = 0
        self._share_s = 0.0
        """Seconds that a load would have been given that was here since the beginning."""
        self._until_s = 0.0

    def begin(self, now: float) -> float:
        """What ``end`` wants to be told."""
        self._advance(now)
        self._loads += 1
        return self._share_s

    def end(self, began: float, now: float) -> float:
        """The load's own seconds."""
        self._advance(now)
        self._loads -= 1
        return self._share_s - began

    def _advance(self, now: float) -> None:
        if self._loads:
            self._share_s += (now - self._until_s) / self._loads
        self._until_s = now
