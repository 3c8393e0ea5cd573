"""Decides whether an engine is alive, from the age of its last report."""

import msgspec

from loraserve.messages import EngineCapabilities, EngineLoad, EngineSeen

FORGET_AFTER_S = 60.0
"""An engine that sends no report for this time is forgotten. If it reports again, it counts as new."""


class _Report(msgspec.Struct, frozen=True):
    load: EngineLoad
    capabilities: EngineCapabilities
    at_s: float


class Liveness:
    """Tracks the last report of each engine. A draining engine is alive, since it still serves requests."""

    def __init__(self, dead_after_s: float) -> None:
        self._dead_after_s = dead_after_s
        self._reports: dict[str, _Report] = {}

    def report(self, load: EngineLoad, capabilities: EngineCapabilities, now: float) -> bool:
        """Store a report. Returns whether the engine is new, was dead, was restarted or has changed its state."""
        before = self._reports.get(load.engine)
        self._reports[load.engine] = _Report(load, capabilities, now)
        return (
            before is None
            or now - before.at_s > self._dead_after_s
            or before.load.incarnation != load.incarnation
            or before.load.state != load.state
        )

    def engines(self, now: float) -> tuple[EngineSeen, ...]:
        """Return all engines that reported within FORGET_AFTER_S, sorted by name."""
        self._reports = {name: last for name, last in self._reports.items() if now - last.at_s <= FORGET_AFTER_S}
        return tuple(
            EngineSeen(
                load=last.load,
                capabilities=last.capabilities,
                age_s=now - last.at_s,
                alive=now - last.at_s <= self._dead_after_s,
            )
            for _, last in sorted(self._reports.items())
        )

    def next_death_s(self, now: float) -> float | None:
        """Return the seconds until the next engine counts as dead if no report arrives; None if no engine is alive."""
        left_s = [last.at_s + self._dead_after_s - now for last in self._reports.values()]
        return min((seconds for seconds in left_s if seconds >= 0), default=None)
