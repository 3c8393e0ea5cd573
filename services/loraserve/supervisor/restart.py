"""Decides whether and when to restart a process that ended. Has no clock and no I/O."""

import msgspec

STOPPED_EXIT = 0
CONFIG_ERROR_EXIT = 2
FIRST_DELAY_S = 0.2
LONGEST_DELAY_S = 5.0
STABLE_RUN_S = 30.0
"""A run of at least this time resets the restart delay to ``FIRST_DELAY_S``."""
START_ATTEMPTS = 3


class Restart(msgspec.Struct, frozen=True):
    delay_s: float


class StopCluster(msgspec.Struct, frozen=True):
    """The decision to stop the cluster for ``reason``, because a restart cannot help."""

    reason: str


class RestartHistory:
    """Counts the failures of one process. The restart delay doubles with each failure and resets after a stable run."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._failures = 0

    def on_exit(self, exit_status: int, ran_s: float, cluster_ready: bool) -> Restart | StopCluster:
        """Return whether to restart the process or stop the cluster. A negative ``exit_status`` is a signal number."""
        if exit_status == STOPPED_EXIT:
            # Somebody asked the process to stop, such as scripts/restart. That is no failure.
            return Restart(0.0)
        if exit_status == CONFIG_ERROR_EXIT:
            return StopCluster(f"{self._name} refused its configuration")
        if ran_s >= STABLE_RUN_S:
            self._failures = 0
        self._failures += 1
        if not cluster_ready and self._failures >= START_ATTEMPTS:
            return StopCluster(f"{self._name} ended {self._failures} times while starting (exit status {exit_status})")
        return Restart(min(FIRST_DELAY_S * 2 ** (self._failures - 1), LONGEST_DELAY_S))
