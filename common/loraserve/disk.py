"""Flushes file changes to the disk, so that they survive a power failure."""

import os
from pathlib import Path


def sync_to_disk(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk. After a rename, flush the folder of the file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
