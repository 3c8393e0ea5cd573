"""Engines of one machine, each held to a share of a core that no other lends it more of."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from harness.report import cores
from harness.worker import WORKERS
from workers.limit_cpu import cpu_s

FOR_ENGINES = 0.6
"""Of the cores; the rest is for gateway, router, monitor and the load generator."""


def share_of_core(engines: int) -> float:
    """What each of so many engines has, at most one core: an engine computes with one thread here."""
    return min(1.0, FOR_ENGINES * cores() / engines)


@contextmanager
def held_to(share: float, pids: Sequence[int]) -> Iterator[int]:
    """Those processes, for the while, to ``share`` of a core each. The process that does it."""
    command = [sys.executable, str(WORKERS / "limit_cpu.py"), str(share), *map(str, pids)]
    limiter = subprocess.Popen(command, stdin=subprocess.PIPE)
    try:
        yield limiter.pid
    finally:
        assert limiter.stdin is not None
        limiter.stdin.close()
        limiter.wait(timeout=10)


class CoresMeter:
    """How many cores processes use from now on; without any, all that runs on the machine."""

    def __init__(self, pids: Sequence[int] | None = None) -> None:
        self._pids = pids
        self._began_s = time.monotonic()
        self._used_s = self._cpu_s()

    def cores(self) -> float | None:
        """None where the machine does not say."""
        used_s = self._cpu_s()
        if used_s is None or self._used_s is None:
            return None
        return (used_s - self._used_s) / (time.monotonic() - self._began_s)

    def _cpu_s(self) -> float | None:
        return machine_cpu_s() if self._pids is None else sum(map(cpu_s, self._pids))


def machine_cpu_s() -> float | None:
    """CPU time of all cores since the machine started; None where it is not Linux."""
    try:
        fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except OSError:
        return None
    idle = fields[3] + fields[4]
    return (sum(fields) - idle) / os.sysconf("SC_CLK_TCK")
