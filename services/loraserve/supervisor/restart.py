"""Decides whether and when a process that ended is restarted. Pure."""

import msgspec

CONFIG_ERROR_EXIT = 2
FIRST_DELAY_S = 0.2
LONGEST_DELAY_S = 5.0
STABLE_RUN_S = 30.0
"""A process that ran this long had started well, so the delay begins at ``FIRST_DELAY_S`` again."""
START_ATTEMPTS = 3


class Restart(msgspec.Struct, frozen=True):
    """Restart the process after ``delay_s``."""

    delay_s: float


class StopCluster(msgspec.Struct, frozen=True):
    """A restart cannot help: stop the cluster and report the reason."""

    reason: str


class RestartHistory:
    """Counts the failures of one process. The delay doubles with each failure and is reset by a stable run."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._failures = 0

    def on_exit(self, exit_status: int, ran_s: float, cluster_ready: bool) -> Restart | StopCluster:
        """Return what to do about an unexpected exit. ``exit_status`` is negative for a signal."""
        if exit_status == CONFIG_ERROR_EXIT:
            return StopCluster(f"{self._name} refused its configuration")
        if ran_s >= STABLE_RUN_S:
            self._failures = 0
        self._failures += 1
        if not cluster_ready and self._failures >= START_ATTEMPTS:
            return StopCluster(f"{self._name} ended {self._failures} times while starting (exit status {exit_status})")
        return Restart(min(FIRST_DELAY_S * 2 ** (self._failures - 1), LONGEST_DELAY_S))
