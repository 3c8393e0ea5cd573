"""A peer's shared memory in this process."""

import asyncio
import fcntl
import mmap
import os
import select
import stat

import numpy as np

from loraserve.transfer.protocol import ShmHandle, TransferError, asked
from loraserve.transfer.shared_memory import SEALS, link_text


class Mapping:
    """Readable, never writable. Raises TransferError ``gone`` or ``refused``.

    ``death`` is a descriptor that becomes readable when the owner dies.
    """

    def __init__(self, handle: ShmHandle) -> None:
        self.loop = asyncio.get_running_loop()
        descriptor = _opened(handle)
        try:
            _check(handle, descriptor)
            memory = mmap.mmap(descriptor, handle.length_bytes, prot=mmap.PROT_READ)
            self.death = os.pidfd_open(handle.pid)
        except (OSError, ValueError, OverflowError) as error:
            raise _failed(handle, error) from error
        finally:
            os.close(descriptor)
        # Unmapped with the last array that lies in it.
        self.data = np.frombuffer(memory, np.uint8)
        try:
            # The number may have been another process's by then.
            there(handle)
        except TransferError:
            os.close(self.death)
            raise

    def close(self) -> None:
        """What is being copied stays mapped until it is."""
        os.close(self.death)


def there(handle: ShmHandle) -> None:
    """Raises TransferError unless the owner still lives and offers this very memory."""
    try:
        found = os.readlink(_path(handle))
    except OSError as error:
        raise _failed(handle, error) from error
    if found != link_text(handle.name):
        raise _gone(handle)


def _opened(handle: ShmHandle) -> int:
    try:
        # A descriptor that became a pipe meanwhile must not make us wait.
        return os.open(_path(handle), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _failed(handle, error) from error


def _check(handle: ShmHandle, descriptor: int) -> None:
    if os.readlink(f"/proc/self/fd/{descriptor}") != link_text(handle.name):
        raise _gone(handle)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_size < handle.length_bytes:
        raise _refused(handle, f"it is of {found.st_size} bytes")
    if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & SEALS != SEALS:
        raise _refused(handle, "its length is not sealed")


def _path(handle: ShmHandle) -> str:
    return f"/proc/{handle.pid}/fd/{handle.descriptor}"


def _failed(handle: ShmHandle, error: Exception) -> TransferError:
    # What is left of a dead process until its parent has heard of it is not ours to look at either.
    if isinstance(error, FileNotFoundError | ProcessLookupError) or _dead(handle.pid):
        return _gone(handle)
    return _refused(handle, str(error))


def _dead(pid: int) -> bool:
    try:
        watch = os.pidfd_open(pid)
    except OSError:
        return True
    try:
        look = select.poll()
        look.register(watch, select.POLLIN)
        return bool(look.poll(0))
    finally:
        os.close(watch)


def _gone(handle: ShmHandle) -> TransferError:
    return TransferError(
        "gone",
        f"{asked(handle, 'a read')}: process {handle.pid} died or withdrew them; read from another source",
    )


def _refused(handle: ShmHandle, why: str) -> TransferError:
    return TransferError(
        "refused",
        f"{asked(handle, 'a read')}: {why}; both processes must be of one user and one PID namespace, or use tcp",
    )
