"""The common part of the transports within one machine: the check that the owner still offers its memory.

The owner keeps a descriptor with a random name open as long as it offers the memory. The reader checks /proc/PID/fd/N
before and after each copy, and a pidfd tells it when the owner dies.
"""

import asyncio
import os
import select
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from loraserve.messages.transfer import SameHostHandle
from loraserve.transfer.protocol import TransferError, describe

NAME_PREFIX = "loraserve-"


class Closeable(Protocol):
    def close(self) -> None: ...


HandleT = TypeVar("HandleT", bound=SameHostHandle)
MappedT = TypeVar("MappedT", bound=Closeable)


class SameHostExporter:
    """Base class of the exporters within one machine. Keeps a descriptor open for each offered memory."""

    def __init__(self, owner: str, incarnation: str) -> None:
        self._owner = owner
        self._incarnation = incarnation
        self._descriptors: list[int] = []

    def close(self) -> None:
        """Withdraw all handles: new reads fail with ``gone``. The memory itself is not freed."""
        while self._descriptors:
            os.close(self._descriptors.pop())


class Mappings(Generic[HandleT, MappedT]):
    """Cache of peers' mapped memories. Use it from one event loop.

    At most ``limit`` stay mapped; the least recently read memory is closed first. The memory of a dead process is
    closed at once, so that the system can free it.
    """

    def __init__(self, open_memory: Callable[[HandleT], MappedT], limit: int) -> None:
        self._open_memory = open_memory
        self._limit = limit
        self._mapped: OrderedDict[HandleT, tuple[MappedT, int]] = OrderedDict()
        self._loop: asyncio.AbstractEventLoop | None = None

    def __len__(self) -> int:
        return len(self._mapped)

    def get(self, handle: HandleT) -> MappedT:
        """Return the mapped memory, and map it if necessary. Raises TransferError."""
        self.check(handle)
        found = self._mapped.get(handle)
        if found is None:
            found = self._open(handle)
        self._mapped.move_to_end(handle)
        return found[0]

    def check(self, handle: HandleT) -> None:
        """Raise TransferError and close the memory if the owner no longer offers it."""
        try:
            check_offered(handle)
        except TransferError:
            self.drop(handle)
            raise

    def drop(self, handle: HandleT) -> None:
        if handle in self._mapped:
            mapped, owner = self._mapped.pop(handle)
            assert self._loop is not None
            self._loop.remove_reader(owner)
            os.close(owner)
            mapped.close()

    def close(self) -> None:
        for handle in list(self._mapped):
            self.drop(handle)

    def _open(self, handle: HandleT) -> tuple[MappedT, int]:
        self._loop = asyncio.get_running_loop()
        mapped = self._open_memory(handle)
        try:
            owner = open_owner(handle)
        except TransferError:
            mapped.close()
            raise
        self._mapped[handle] = mapped, owner
        self._loop.add_reader(owner, self.drop, handle)
        while len(self._mapped) > self._limit:
            self.drop(next(iter(self._mapped)))
        return mapped, owner


def check_offered(handle: SameHostHandle) -> None:
    """Raise TransferError unless the owner is alive and still offers this memory."""
    try:
        found = os.readlink(descriptor_path(handle))
    except OSError as error:
        raise error_of(handle, error) from error
    if found != link_text(handle.name):
        raise gone_error(handle)


def open_owner(handle: SameHostHandle) -> int:
    """Return a pidfd that becomes readable when the owner dies. The caller closes it. Raises TransferError."""
    try:
        owner = os.pidfd_open(handle.pid)
    except (OSError, OverflowError) as error:
        raise error_of(handle, error) from error
    try:
        # The process id may have been reused before the pidfd was opened.
        check_offered(handle)
    except TransferError:
        os.close(owner)
        raise
    return owner


def descriptor_path(handle: SameHostHandle) -> str:
    """Return the path of the owner's descriptor, as a string: a pathlib.Path would slow down every read."""
    return f"/proc/{handle.pid}/fd/{handle.descriptor}"


def link_text(name: str) -> str:
    """Return the target of the link /proc/PID/fd/N for a memfd with this name."""
    return f"/memfd:{name} (deleted)"


def error_of(handle: SameHostHandle, error: Exception) -> TransferError:
    """Return the TransferError for an error that occurred while checking the owner's process."""
    # The files of a zombie process cannot be opened either, so check whether the owner is dead.
    if isinstance(error, FileNotFoundError | ProcessLookupError) or _is_dead(handle.pid):
        return gone_error(handle)
    return refused_error(handle, str(error))


def gone_error(handle: SameHostHandle) -> TransferError:
    return TransferError(
        "gone",
        f"{describe(handle, 'a read')}: process {handle.pid} died or withdrew the memory; read from another source",
    )


def refused_error(handle: SameHostHandle, reason: str) -> TransferError:
    return TransferError(
        "refused",
        f"{describe(handle, 'a read')}: {reason}; both processes must belong to one user and one PID namespace, or "
        "use tcp",
    )


def _is_dead(pid: int) -> bool:
    try:
        owner = os.pidfd_open(pid)
    except OSError:
        return True
    try:
        poll = select.poll()
        poll.register(owner, select.POLLIN)
        return bool(poll.poll(0))
    finally:
        os.close(owner)
