"""When a process that ended is started again. Pure."""

import msgspec

CONFIG_ERROR_EXIT = 2
FIRST_DELAY_S = 0.2
LONGEST_DELAY_S = 5.0
CALM_S = 30.0
"""A process that ran this long had started well: its next restart is quick again."""


class Restart(msgspec.Struct, frozen=True):
    """Start it again after ``delay_s``."""

    delay_s: float


class StopCluster(msgspec.Struct, frozen=True):
    """Starting it again cannot help; the cluster stops and says why."""

    reason: str


class RestartHistory:
    """Decides for one process name. Delays double while it keeps failing and start over once it ran calmly."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._failures = 0

    def ended(self, exit_status: int, ran_s: float, cluster_ready: bool) -> Restart | StopCluster:
        """What to do about an end that nobody asked for. ``exit_status`` is negative for signals."""
        if exit_status == CONFIG_ERROR_EXIT:
            return StopCluster(f"{self._name} refused its configuration")
        if ran_s >= CALM_S:
            self._failures = 0
        self._failures += 1
        if not cluster_ready and self._failures >= 3:
            return StopCluster(f"{self._name} ended {self._failures} times while starting (exit status {exit_status})")
        return Restart(min(FIRST_DELAY_S * 2 ** (self._failures - 1), LONGEST_DELAY_S))
