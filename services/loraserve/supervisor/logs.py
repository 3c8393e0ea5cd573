"""Limits the size of the log files that the supervisor's processes write.

A process writes to a descriptor that it inherited, so its log cannot be renamed while it runs. The supervisor copies a
large log to ``NAME.log.1`` and truncates it. The processes append (O_APPEND), so their next line starts the empty file.
"""

import asyncio
import os
import shutil
from collections.abc import Callable
from pathlib import Path

MAX_LOG_BYTES = 64 << 20
CHECK_INTERVAL_S = 5.0


async def limit_logs(log_dir: Path, say: Callable[[str], None], max_bytes: int = MAX_LOG_BYTES) -> None:
    """Rotate the logs in ``log_dir`` that exceed ``max_bytes``, until cancelled."""
    while True:
        await asyncio.sleep(CHECK_INTERVAL_S)
        for problem in await asyncio.to_thread(rotate_logs, log_dir, max_bytes):
            say(problem)


def rotate_logs(log_dir: Path, max_bytes: int) -> list[str]:
    """Rotate every ``*.log`` file larger than ``max_bytes``. Returns a text for each log whose content was lost."""
    problems = []
    for log in sorted(log_dir.glob("*.log")):
        try:
            if log.stat().st_size > max_bytes:
                problems += rotate(log)
        except OSError as error:
            problems.append(f"cannot rotate {log}: {error.strerror}")
    return problems


def rotate(log: Path) -> list[str]:
    """Move the content of the log to ``NAME.log.1``. If the disk has no room for the copy, discard the content.

    Lines written between the end of the copy and the truncation are lost.
    """
    old = log.with_name(f"{log.name}.1")
    # Removed first, because the disk may have no room for two old files.
    old.unlink(missing_ok=True)
    problems = []
    with log.open("r+b", buffering=0) as content:
        try:
            with old.open("wb") as copy:
                shutil.copyfileobj(content, copy, 1 << 20)
        except OSError as error:
            old.unlink(missing_ok=True)
            problems.append(f"{log} was emptied without a copy ({error.strerror}); free some disk space")
        os.ftruncate(content.fileno(), 0)
    return problems
