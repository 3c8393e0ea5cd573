"""Engines of one machine, each held to a share of a core that no other lends it more of."""

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
"""Of the cores; the rest is for gateway, router, monitor and the load generator."""


def share_of_core(engines: int) -> float:
    """What each of so many engines has, at most one core: an engine computes with one thread here."""
    return min(1.0, FOR_ENGINES * core_count() / engines)


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


class Meter:
    """How much a counter of seconds grows a second from now on: cores in use, threads that wait."""

    def __init__(self, read_s: Callable[[], float | None]) -> None:
        self._read_s = read_s
        self._began_s = time.monotonic()
        self._first_s = self._known_s()

    def rate(self) -> float | None:
        """None where the machine does not say, or a process of these has ended."""
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
    """CPU time of all of them. Raises OSError where one has ended."""
    return sum(map(cpu_s, pids))


def machine_s() -> float:
    """CPU time of all cores since the machine started. Raises OSError where it is not Linux."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    idle = fields[3] + fields[4]
    return (sum(fields) - idle) / os.sysconf("SC_CLK_TCK")


def waited_s(pids: Sequence[int]) -> float | None:
    """Time in which threads of these could have run and had no core; who is held back waits for its budget, which is
    not counted. None where the kernel does not count it."""
    files = [path for pid in pids for path in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    return sum(int(path.read_text().split()[1]) for path in files) / 1e9 if files else None
