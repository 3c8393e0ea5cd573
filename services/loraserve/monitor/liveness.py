"""Decides whether an engine is alive, from the age of its last report and from lost connections."""

import msgspec

from loraserve.messages import EngineCapabilities, EngineLoad, EngineSeen

FORGET_AFTER_S = 60.0
"""An engine that sends no report for this time is forgotten. If it reports again, it counts as new."""


class _Report(msgspec.Struct, frozen=True):
    load: EngineLoad
    capabilities: EngineCapabilities
    at_s: float
    ended: bool = False

    def is_alive(self, now: float, dead_after_s: float) -> bool:
        return not self.ended and now - self.at_s <= dead_after_s


class Liveness:
    """Tracks the last report of each engine. A draining engine is alive, since it still serves requests."""

    def __init__(self, dead_after_s: float) -> None:
        self._dead_after_s = dead_after_s
        self._reports: dict[str, _Report] = {}

    def report(self, load: EngineLoad, capabilities: EngineCapabilities, now: float) -> bool:
        """Store a report. Returns whether the engine appears, returns from the dead, restarted or changed its state."""
        before = self._reports.get(load.engine)
        self._reports[load.engine] = _Report(load, capabilities, now)
        return (
            before is None
            or not before.is_alive(now, self._dead_after_s)
            or before.load.incarnation != load.incarnation
            or before.load.state != load.state
        )

    def end(self, engine: str, incarnation: str) -> bool:
        """Record that the process of this incarnation ended. Returns False if another incarnation reported since."""
        last = self._reports.get(engine)
        if last is None or last.load.incarnation != incarnation:
            return False
        self._reports[engine] = msgspec.structs.replace(last, ended=True)
        return True

    def has_ended(self, engine: str, incarnation: str) -> bool:
        """Return whether the process of this incarnation ended: after ``end``, or if another incarnation reported."""
        last = self._reports.get(engine)
        return last is not None and (last.ended or last.load.incarnation != incarnation)

    def engines(self, now: float) -> tuple[EngineSeen, ...]:
        """Return the engines that reported within FORGET_AFTER_S, sorted by name, and forget all others.

        An engine is ``alive`` if it reported within ``dead_after_s`` and its process did not end.
        """
        self._reports = {name: last for name, last in self._reports.items() if now - last.at_s <= FORGET_AFTER_S}
        return tuple(
            EngineSeen(
                load=last.load,
                capabilities=last.capabilities,
                age_s=now - last.at_s,
                alive=last.is_alive(now, self._dead_after_s),
                ended=last.ended,
            )
            for _, last in sorted(self._reports.items())
        )

    def next_death_s(self, now: float) -> float | None:
        """Return the seconds until the first live engine counts as dead without a report; None if none is alive."""
        left_s = [last.at_s + self._dead_after_s - now for last in self._reports.values() if not last.ended]
        return min((seconds for seconds in left_s if seconds >= 0), default=None)
