"""Peers' memories in this process: one by one, and the few that were read last."""

import asyncio
import fcntl
import mmap
import os
import stat
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import numpy as np

from loraserve.transfer.near import failed, gone, path, refused, there, watch
from loraserve.transfer.protocol import NearHandle, ShmHandle, TransferError
from loraserve.transfer.shared_memory import SEALS, link_text


class Closes(Protocol):
    def close(self) -> None: ...


HandleT = TypeVar("HandleT", bound=NearHandle)
MappedT = TypeVar("MappedT", bound=Closes)


class Mappings(Generic[HandleT, MappedT]):
    """Opened by ``opened``, for whoever asks in one event loop. Of more than ``most`` the least recently read goes, of
    a process that died all at once, not at the next read: it is the machine's again."""

    def __init__(self, opened: Callable[[HandleT], MappedT], most: int) -> None:
        self._opened = opened
        self._most = most
        self._mapped: OrderedDict[HandleT, tuple[MappedT, int]] = OrderedDict()
        self._loop: asyncio.AbstractEventLoop | None = None

    def __len__(self) -> int:
        return len(self._mapped)

    def get(self, handle: HandleT) -> MappedT:
        """Raises TransferError."""
        self.check(handle)
        found = self._mapped.get(handle)
        if found is None:
            found = self._open(handle)
        self._mapped.move_to_end(handle)
        return found[0]

    def check(self, handle: HandleT) -> None:
        """Raises TransferError unless the memory is offered still."""
        try:
            there(handle)
        except TransferError:
            self.drop(handle)
            raise

    def drop(self, handle: HandleT) -> None:
        if handle in self._mapped:
            mapped, death = self._mapped.pop(handle)
            assert self._loop is not None
            self._loop.remove_reader(death)
            os.close(death)
            mapped.close()

    def close(self) -> None:
        for handle in list(self._mapped):
            self.drop(handle)

    def _open(self, handle: HandleT) -> tuple[MappedT, int]:
        self._loop = asyncio.get_running_loop()
        mapped = self._opened(handle)
        try:
            death = watch(handle)
        except TransferError:
            mapped.close()
            raise
        self._mapped[handle] = mapped, death
        self._loop.add_reader(death, self.drop, handle)
        while len(self._mapped) > self._most:
            self.drop(next(iter(self._mapped)))
        return mapped, death


class Mapping:
    """Shared memory: readable, never writable. Raises TransferError ``gone`` or ``refused``."""

    def __init__(self, handle: ShmHandle) -> None:
        descriptor = _opened(handle)
        try:
            _check(handle, descriptor)
            memory = mmap.mmap(descriptor, handle.length_bytes, prot=mmap.PROT_READ)
        except (OSError, ValueError, OverflowError) as error:
            raise failed(handle, error) from error
        finally:
            os.close(descriptor)
        self.data = np.frombuffer(memory, np.uint8)

    def close(self) -> None:
        """Unmapped with the last array that lies in it: what is being copied stays mapped until it is."""


def _opened(handle: ShmHandle) -> int:
    try:
        # A descriptor that became a pipe meanwhile must not make us wait.
        return os.open(path(handle), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise failed(handle, error) from error


def _check(handle: ShmHandle, descriptor: int) -> None:
    if os.readlink(f"/proc/self/fd/{descriptor}") != link_text(handle.name):
        raise gone(handle)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_size < handle.length_bytes:
        raise refused(handle, f"it is of {found.st_size} bytes")
    if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & SEALS != SEALS:
        raise refused(handle, "its length is not sealed")
