"""Which engines are alive, by the age of their last report. Pure."""

import msgspec

from loraserve.messages import EngineCapabilities, EngineLoad, EngineSeen

FORGET_AFTER_S = 60.0
"""An engine that was silent this long is no longer spoken of; when it comes back it is new."""


class _Seen(msgspec.Struct, frozen=True):
    load: EngineLoad
    capabilities: EngineCapabilities
    at_s: float


class Liveness:
    """Last reports of all engines. One that drains is alive: it still serves its streams."""

    def __init__(self, dead_after_s: float) -> None:
        self._dead_after_s = dead_after_s
        self._seen: dict[str, _Seen] = {}

    def report(self, load: EngineLoad, capabilities: EngineCapabilities, now: float) -> bool:
        """Take a report; True where the engine is new, or had been dead, or has restarted."""
        before = self._seen.get(load.engine)
        self._seen[load.engine] = _Seen(load, capabilities, now)
        return (
            before is None
            or now - before.at_s > self._dead_after_s
            or before.load.incarnation != load.incarnation
            or before.load.state != load.state
        )

    def engines(self, now: float) -> tuple[EngineSeen, ...]:
        """Everyone heard of within the last minute, in order of name."""
        self._seen = {name: seen for name, seen in self._seen.items() if now - seen.at_s <= FORGET_AFTER_S}
        return tuple(
            EngineSeen(
                load=seen.load,
                capabilities=seen.capabilities,
                age_s=now - seen.at_s,
                alive=now - seen.at_s <= self._dead_after_s,
            )
            for _, seen in sorted(self._seen.items())
        )

    def next_death_s(self, now: float) -> float | None:
        """Seconds until the next engine would be declared dead without another report; None if all are dead."""
        ends = [seen.at_s + self._dead_after_s - now for seen in self._seen.values()]
        return min((end for end in ends if end >= 0), default=None)
