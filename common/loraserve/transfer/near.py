"""Memory of a process of this machine: whether it is offered still, and what to say where it is not."""

import os
import select

from loraserve.transfer.protocol import NearHandle, TransferError, asked
from loraserve.transfer.shared_memory import link_text


class NearExporter:
    """What exporters to processes of this machine share: descriptors by which readers see that they still offer it."""

    def __init__(self, owner: str, incarnation: str) -> None:
        self._owner = owner
        self._incarnation = incarnation
        self._descriptors: list[int] = []

    def close(self) -> None:
        """See Exporter."""
        while self._descriptors:
            os.close(self._descriptors.pop())


def there(handle: NearHandle) -> None:
    """Raises TransferError unless the owner still lives and offers this very memory."""
    try:
        found = os.readlink(path(handle))
    except OSError as error:
        raise failed(handle, error) from error
    if found != link_text(handle.name):
        raise gone(handle)


def watch(handle: NearHandle) -> int:
    """A descriptor that becomes readable when the owner dies; the caller's to close. Raises TransferError."""
    try:
        death = os.pidfd_open(handle.pid)
    except (OSError, OverflowError) as error:
        raise failed(handle, error) from error
    try:
        # The number may have been another process's by then.
        there(handle)
    except TransferError:
        os.close(death)
        raise
    return death


def path(handle: NearHandle) -> str:
    """The owner's descriptor. No Path: one is looked at in every read, after a copy left no code in the caches."""
    return f"/proc/{handle.pid}/fd/{handle.descriptor}"


def failed(handle: NearHandle, error: Exception) -> TransferError:
    """What an error means that came of looking at the owner."""
    # What is left of a dead process until its parent has heard of it is not ours to look at either.
    if isinstance(error, FileNotFoundError | ProcessLookupError) or _dead(handle.pid):
        return gone(handle)
    return refused(handle, str(error))


def gone(handle: NearHandle) -> TransferError:
    return TransferError(
        "gone",
        f"{asked(handle, 'a read')}: process {handle.pid} died or withdrew them; read from another source",
    )


def refused(handle: NearHandle, why: str) -> TransferError:
    return TransferError(
        "refused",
        f"{asked(handle, 'a read')}: {why}; both processes must be of one user and one PID namespace, or use tcp",
    )


def _dead(pid: int) -> bool:
    try:
        death = os.pidfd_open(pid)
    except OSError:
        return True
    try:
        look = select.poll()
        look.register(death, select.POLLIN)
        return bool(look.poll(0))
    finally:
        os.close(death)
