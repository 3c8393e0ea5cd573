"""Limits processes to a share of one core each, as cpulimit does: limit_cpu.py SHARE PID...

Without a limit, an overloaded engine would use the idle cores of the others, which engines with a GPU each cannot do.
The limits end when standard input closes.
"""

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Sequence

TICK_S = 0.004
LARGEST_CREDIT_S = 0.004
"""CPU time that an idle process may save up; small, so that it does not start faster than it continues."""


class Budget:
    """The CPU time credit of one process in seconds: it grows with time and shrinks with use."""

    def __init__(self, share: float, now_s: float, used_s: float) -> None:
        self._share = share
        self._now_s = now_s
        self._used_s = used_s
        self._credit_s = 0.0

    def may_run(self, now_s: float, used_s: float) -> bool:
        """Return whether the process may run, given its total CPU time so far."""
        self._credit_s += self._share * (now_s - self._now_s) - (used_s - self._used_s)
        self._credit_s = min(self._credit_s, LARGEST_CREDIT_S)
        self._now_s, self._used_s = now_s, used_s
        return self._credit_s > 0


def cpu_s(pid: int) -> float:
    """Return the CPU time of all threads of a process. Raises OSError if it does not exist."""
    # Linux encodes the id of a process's CPU clock as its inverted pid and the kind of clock.
    return time.clock_gettime((~pid << 3) | 2)


def limit(share: float, pids: Sequence[int]) -> None:
    """Enforce the limit until standard input closes."""
    budgets = {pid: Budget(share, time.monotonic(), cpu_s(pid)) for pid in pids}
    stopped: set[int] = set()
    try:
        while not select.select([sys.stdin], [], [], TICK_S)[0]:
            for pid, budget in budgets.items():
                with contextlib.suppress(OSError):
                    _apply(pid, budget.may_run(time.monotonic(), cpu_s(pid)), stopped)
    finally:
        for pid in stopped:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGCONT)


def _apply(pid: int, may_run: bool, stopped: set[int]) -> None:
    if may_run and pid in stopped:
        os.kill(pid, signal.SIGCONT)
        stopped.discard(pid)
    elif not may_run and pid not in stopped:
        os.kill(pid, signal.SIGSTOP)
        stopped.add(pid)


if __name__ == "__main__":
    limit(float(sys.argv[1]), [int(pid) for pid in sys.argv[2:]])
