"""Is the engine of a stream still there? Judged from the monitor's reports and from its tokens. Pure."""

import msgspec

from loraserve.messages import ClusterLoad, EngineLoad

HEARD_RECENTLY_S = 1.0
"""An engine whose token came this recently lives, whatever a report says: reports are older than tokens."""

LOST_AFTER_S = 1.5
"""A request that its engine no longer has this long after the last token has ended, and the end was lost."""

CLOCK_MARGIN_S = 0.25
"""A report is dated from its age when published; the way from there to here takes time too."""


class Report(msgspec.Struct, frozen=True):
    load: EngineLoad
    reported_s: float
    alive: bool


class EngineWatch:
    """Last reports of all engines, and who was heard when."""

    def __init__(self, dead_after_s: float) -> None:
        self.reports: dict[str, Report] = {}
        self.cluster: ClusterLoad | None = None
        self.cluster_s = 0.0
        self._dead_after_s = dead_after_s
        self._monitor = ""
        self._monitor_since_s = 0.0
        self._heard: dict[str, tuple[str, float]] = {}

    def observe(self, load: ClusterLoad, now: float) -> None:
        """A publication of the monitor arrived; the ages in it are from when it was sent."""
        if load.incarnation != self._monitor:
            self._monitor, self._monitor_since_s = load.incarnation, now
        self.cluster, self.cluster_s = load, now
        self.reports = {seen.load.engine: Report(seen.load, now - seen.age_s, seen.alive) for seen in load.engines}

    def heard(self, engine: str, incarnation: str, now: float) -> None:
        """Tokens came from it."""
        self._heard[engine] = (incarnation, now)

    def ready_engines(self, now: float) -> list[str]:
        """Engines that take requests now; none when the monitor itself has been silent for long."""
        if now - self.cluster_s > 4 * self._dead_after_s:
            return []
        return [name for name, report in self.reports.items() if report.alive and report.load.state == "READY"]

    def gone(self, engine: str, incarnation: str, routed_s: float, now: float) -> str:
        """Why a stream that went to this incarnation of the engine at ``routed_s`` cannot finish, or ""."""
        who, heard_s = self._heard.get(engine, ("", 0.0))
        proof_s = max(routed_s, heard_s) if who == incarnation else routed_s
        if now - proof_s < HEARD_RECENTLY_S:
            return ""
        report = self.reports.get(engine)
        if report is None:
            # A monitor that has just started has not heard of everybody yet.
            silent_s = now - max(self._monitor_since_s, proof_s)
            return "it is not in the cluster any more" if silent_s > 2 * self._dead_after_s else ""
        if report.load.incarnation != incarnation:
            return "it was restarted" if report.reported_s > routed_s + CLOCK_MARGIN_S else ""
        if not report.alive and now - proof_s > self._dead_after_s:
            return "it stopped reporting"
        return ""

    def has_ended(self, engine: str, incarnation: str, request_id: str, silent_since_s: float) -> bool:
        """Whether the engine listed its requests well after ``silent_since_s`` and this one is not among them."""
        report = self.reports.get(engine)
        if report is None or report.load.incarnation != incarnation:
            return False
        load = report.load
        lists_all = len(load.request_ids) == load.running + load.waiting
        return lists_all and report.reported_s > silent_since_s + LOST_AFTER_S and request_id not in load.request_ids
