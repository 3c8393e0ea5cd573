"""Engines of one machine, each held to a share of a core that no other lends it more of."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from harness.report import cores
from harness.worker import WORKERS

FOR_ENGINES = 0.7
"""Of the cores; the rest is for gateway, router, monitor and the load generator."""


def share_of_core(engines: int) -> float:
    """What each of so many engines has, at most one core: an engine computes with one thread here."""
    return min(1.0, FOR_ENGINES * cores() / engines)


@contextmanager
def held_to(share: float, pids: Sequence[int]) -> Iterator[None]:
    """Those processes, for the while, to ``share`` of a core each."""
    command = [sys.executable, str(WORKERS / "limit_cpu.py"), str(share), *map(str, pids)]
    limiter = subprocess.Popen(command, stdin=subprocess.PIPE)
    try:
        yield
    finally:
        assert limiter.stdin is not None
        limiter.stdin.close()
        limiter.wait(timeout=10)


def cores_used_s() -> float | None:
    """Seconds of CPU time that all cores of the machine have spent on anything since it started; None off Linux."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    except OSError:
        return None
    idle = int(fields[3]) + int(fields[4])
    return (sum(map(int, fields[:8])) - idle) / 100
