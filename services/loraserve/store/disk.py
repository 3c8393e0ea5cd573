"""Durable writes, reserved space, folder locks, and the conversion of disk errors to AdapterError."""

import contextlib
import errno
import fcntl
import os
import sqlite3
from collections.abc import Iterable
from pathlib import Path

from loraserve.errors import AdapterError, LoraServeError

# A file-size limit (EFBIG) and a quota (EDQUOT) are reported like a full disk.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_RESERVE_BLOCK_BYTES = 4 << 10


def storage_error(error: OSError | sqlite3.Error, what: str) -> AdapterError:
    """Return an AdapterError with code ``disk_full`` if no space is left, else ``storage``. ``what`` names the data."""
    if isinstance(error, sqlite3.Error):
        full = getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL
    else:
        full = error.errno in _FULL
    if full:
        return AdapterError("disk_full", f"no space left for {what}; free space under cluster.data_dir and try again")
    return AdapterError(
        "storage", f"{what} could not be read or written: {error}; see the store's log and check the disk"
    )


def write_durably(path: Path, blocks: Iterable[bytes | memoryview]) -> None:
    """Create a file and flush its content to the disk. Raises OSError if it exists or cannot be written."""
    with path.open("xb", buffering=0) as file:
        for block in blocks:
            left = memoryview(block)
            while left:
                left = left[file.write(left) :]
        os.fsync(file.fileno())


class SpaceReserve:
    """A file that occupies space, so that a removal can still be recorded when the disk is full."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._path = path
        self._size_bytes = size_bytes

    def fill(self) -> None:
        """Occupy the space. Raises OSError if the disk has less, after it has occupied what there is."""
        # Zeros are written instead of a hole, because a hole occupies no space.
        with self._path.open("ab", buffering=0) as file:
            missing = self._size_bytes - file.tell()
            while missing > 0:
                missing -= file.write(bytes(min(_RESERVE_BLOCK_BYTES, missing)))
            os.fsync(file.fileno())

    def release(self) -> None:
        """Free the space."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)


def lock_folder(folder: Path) -> int:
    """Create the folder if needed and lock it. Close the returned descriptor to unlock it. Raises LoraServeError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise LoraServeError(f"{folder}: {error.strerror}; cluster.data_dir must be a writable folder") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise LoraServeError(
            f"{folder} is in use by another store; stop that one or choose another cluster.data_dir"
        ) from error
    return fd
