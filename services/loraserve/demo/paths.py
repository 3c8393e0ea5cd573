"""Finds the data folder, and builds folders in it atomically."""

import errno
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loraserve.disk import sync_to_disk
from loraserve.errors import ConfigError

MARKER = "source.json"


def default_data_dir() -> Path:
    """Return $LORASERVE_DATA if set, else the user's data folder."""
    if chosen := os.environ.get("LORASERVE_DATA"):
        return Path(chosen).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "loraserve"
    shared = os.environ.get("XDG_DATA_HOME")
    return (Path(shared) if shared else Path.home() / ".local" / "share") / "loraserve"


def build_once(
    target: Path, source: dict[str, Any], build: Callable[[Path], None], progress: Callable[[str], None]
) -> Path:
    """Return the folder ``target``. If it is not current, call ``build`` with an empty folder and rename the result.

    ``source`` describes the inputs of the build and is stored in the folder. The folder is rebuilt if ``source`` has
    changed, or if files are missing or have another size. A lock prevents concurrent builds.
    Raises ConfigError if the disk is full or fails, and any other error of ``build``.
    """
    if is_current(target, source):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.parent / f".{target.name}.lock", progress):
            if not is_current(target, source):
                replace_with_built(target, source, build)
    except OSError as error:
        raise disk_error(error, target) from error
    return target


def is_current(target: Path, source: dict[str, Any]) -> bool:
    """Return whether ``target`` is complete and was built from ``source``."""
    try:
        marker = json.loads((target / MARKER).read_text(encoding="utf-8"))
        if marker["source"] != source:
            return False
        return all((target / name).stat().st_size == size for name, size in marker["file_bytes"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def replace_with_built(target: Path, source: dict[str, Any], build: Callable[[Path], None]) -> None:
    """Build a temporary folder, then rename it to ``target``. The caller must hold the lock."""
    partial = target.parent / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        build(partial)
        sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        (partial / MARKER).write_text(json.dumps({"source": source, "file_bytes": sizes}, indent=2) + "\n")
        # After the rename, a power failure must lose no content.
        for path in [*partial.iterdir(), partial]:
            sync_to_disk(path)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def locked(path: Path, progress: Callable[[str], None]) -> Iterator[None]:
    """Hold an exclusive lock on the file ``path``. The system releases the lock if the process dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process that builds the same folder")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def disk_error(error: OSError, target: Path) -> ConfigError:
    elsewhere = "or set LORASERVE_DATA to another folder"
    remedies = {
        errno.ENOSPC: f"the disk is full; free some space {elsewhere}",
        errno.EDQUOT: f"the disk quota is used up; free some space {elsewhere}",
        errno.EACCES: f"no permission to write; change the folder's owner {elsewhere}",
        errno.EPERM: f"no permission to write; change the folder's owner {elsewhere}",
        errno.EROFS: f"the file system is read-only; mount it writable {elsewhere}",
    }
    remedy = remedies.get(error.errno or 0, f"{error}; check the folder {elsewhere}")
    return ConfigError(f"cannot build {target}: {remedy}")
