"""Limits each engine to a share of a core, and measures CPU use."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from harness.worker import WORKERS
from workers.limit_cpu import cpu_s

from loraserve.device import core_count

FOR_ENGINES = 0.6
"""Share of the cores; the others are for gateway, router, monitor and the load generator."""


def share_of_core(engines: int) -> float:
    """Return the share of a core for each engine. It is at most 1, because these engines compute with one thread."""
    return min(1.0, FOR_ENGINES * core_count() / engines)


@contextmanager
def held_to(share: float, pids: Sequence[int]) -> Iterator[int]:
    """Limit the processes to ``share`` of a core each within the block. Yields the pid of the limiting process."""
    command = [sys.executable, str(WORKERS / "limit_cpu.py"), str(share), *map(str, pids)]
    limiter = subprocess.Popen(command, stdin=subprocess.PIPE)
    try:
        yield limiter.pid
    finally:
        assert limiter.stdin is not None
        limiter.stdin.close()
        limiter.wait(timeout=10)


class Meter:
    """The growth per second of a counter of seconds since creation, such as cores in use."""

    def __init__(self, read_s: Callable[[], float | None]) -> None:
        self._read_s = read_s
        self._began_s = time.monotonic()
        self._first_s = self._known_s()

    def rate(self) -> float | None:
        """Return the growth, or None if the counter is not available or a process has ended."""
        now_s = self._known_s()
        if now_s is None or self._first_s is None:
            return None
        return (now_s - self._first_s) / (time.monotonic() - self._began_s)

    def _known_s(self) -> float | None:
        try:
            return self._read_s()
        except OSError:
            return None


def used_s(pids: Sequence[int]) -> float:
    """Return the total CPU time of the processes. Raises OSError if one has ended."""
    return sum(map(cpu_s, pids))


def machine_s() -> float:
    """Return the CPU time of all cores since boot. Raises OSError if the system is not Linux."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    idle = fields[3] + fields[4]
    return (sum(fields) - idle) / os.sysconf("SC_CLK_TCK")


def waited_s(pids: Sequence[int]) -> float | None:
    """Return the seconds in which runnable threads of the processes waited for a core, or None if not available.

    Time in which a process is stopped by the limiter is not included.
    """
    files = [path for pid in pids for path in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    return sum(int(path.read_text().split()[1]) for path in files) / 1e9 if files else None
