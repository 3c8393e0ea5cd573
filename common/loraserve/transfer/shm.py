"""Transport between processes of one machine: the reader maps the owner's memory and copies; the owner does nothing.

The memory is a memfd, which peers open as /proc/PID/fd/N. The kernel frees it when its last user exits or is killed. A
file in /dev/shm would survive a kill -9 of its owner. Both processes must be in one PID namespace (Compose: `pid:
service:...`); otherwise `choose_transports` selects another transport.

Mappings are kept, because a copy from a mapping that was read before is faster. Measured speeds relative to a plain
memory copy of the same size, on 2 busy cores of a Xeon: from a kept mapping 0.95 to 1.1, from a new mapping 0.7, from
a new mapping populated before the copy 0.8, with preadv 0.4 to 0.8. Each read adds about 0.04 ms, half of it for the
check that the memory is still offered. Above SLICED_BYTES, a read also waits for a thread to wake up.
"""

import asyncio
import fcntl
import mmap
import os
import secrets
import stat
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Event

import numpy as np
import numpy.typing as npt

from loraserve.errors import ConfigError
from loraserve.messages.transfer import TRANSFER_PROTOCOL_VERSION, Handle, ShmHandle
from loraserve.threads import run_in_thread
from loraserve.transfer.protocol import ByteRange, check_read, split_ranges
from loraserve.transfer.same_host import (
    NAME_PREFIX,
    Mappings,
    SameHostExporter,
    descriptor_path,
    error_of,
    gone_error,
    link_text,
    refused_error,
)

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL if hasattr(fcntl, "F_SEAL_SEAL") else 0
"""No process can shorten the memory, not even its owner. So a copy never touches missing pages (SIGBUS)."""
DIRECT_BYTES = 4 << 20
"""The event loop's thread copies reads up to this size at once, in 0.2 ms per MiB."""
SLICED_BYTES = 32 << 20
"""The event loop's thread copies reads up to this size and runs other tasks after every DIRECT_BYTES. This makes a copy
5% slower. A separate thread needs 0.15 to 2 ms to wake up and report on busy cores: a third of a 16 MiB copy."""
PIECE_BYTES = 256 << 20
"""A copy in a thread checks for cancellation between pieces. Shorter pieces made copies of 256 MiB up to twice as slow:
the C library bypasses the CPU caches only for copies larger than the caches."""
THREADS = 2
MAPPINGS = 64

Bytes = npt.NDArray[np.uint8]


def is_supported() -> bool:
    """Return whether this machine supports everything the transport needs."""
    try:
        os.close(os.pidfd_open(os.getpid()))
        os.close(os.memfd_create(NAME_PREFIX, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    except (AttributeError, OSError):
        return False
    return SEALS != 0 and os.path.isdir("/proc/self/fd")


class SharedMemory:
    """Zeroed memory that other processes of this user can map.

    The kernel allocates a page at its first write, so the constructor does not detect a lack of memory. It raises
    ConfigError, whose message ends with ``remedy``, if the memory cannot be mapped.
    """

    def __init__(
        self, length_bytes: int, remedy: str = "lower engine.pool_bytes or take shm out of transfer.transports"
    ) -> None:
        self.name = NAME_PREFIX + secrets.token_hex(16)
        self.length_bytes = length_bytes
        descriptor = os.memfd_create(self.name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.fchmod(descriptor, 0o600)
            os.ftruncate(descriptor, length_bytes)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
            self.view = memoryview(mmap.mmap(descriptor, length_bytes))
        except (OSError, ValueError, OverflowError) as error:
            os.close(descriptor)
            raise ConfigError(
                f"{length_bytes} bytes of shared memory cannot be allocated: {error}; {remedy}"
            ) from error

        self._descriptor = descriptor
        # The finalizer closes the descriptor if ``close`` is not called.
        self._finalizer = weakref.finalize(self, os.close, descriptor)

    def export(self) -> int:
        """Return a duplicate of the memory's descriptor, for peers to open. The caller closes it."""
        return os.dup(self._descriptor)

    def close(self) -> None:
        """Close the descriptor. The memory is freed with its last view. Repeated calls are allowed."""
        self._descriptor = -1
        self._finalizer()


class ShmExporter(SameHostExporter):
    """Offers SharedMemory to peers on this machine."""

    def register(self, region: SharedMemory) -> ShmHandle:
        descriptor = region.export()
        self._descriptors.append(descriptor)
        return ShmHandle(
            protocol=TRANSFER_PROTOCOL_VERSION,
            owner=self._owner,
            incarnation=self._incarnation,
            length_bytes=region.length_bytes,
            pid=os.getpid(),
            descriptor=descriptor,
            name=region.name,
        )


class ShmReader:
    """Reads peers' shared memory. Implements `RegionReader`; use it from one event loop."""

    def __init__(
        self,
        piece_bytes: int = PIECE_BYTES,
        mappings: int = MAPPINGS,
        direct_bytes: int = DIRECT_BYTES,
        sliced_bytes: int = SLICED_BYTES,
    ) -> None:
        self._direct_bytes = direct_bytes
        self._sliced_bytes = sliced_bytes
        self._piece_bytes = piece_bytes
        self._mappings = Mappings(_ShmMapping, mappings)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="shm")

    async def read(self, handle: Handle, ranges: Sequence[ByteRange], into: memoryview) -> None:
        mine, memory = check_read(handle, ShmHandle, ranges, into)
        target = np.frombuffer(memory, np.uint8)
        if target.nbytes <= self._direct_bytes:
            _copy(self._map(mine), ranges, target)
            return
        if target.nbytes <= self._sliced_bytes:
            await self._copy_in_slices(mine, ranges, target)
        else:
            await self._copy_in_thread(mine, ranges, target)
        # The owner may have withdrawn the memory during the copy. This frame holds no reference to the mapping, so that
        # a stored traceback does not keep it mapped.
        self._mappings.check(mine)

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._mappings.close()

    @property
    def mapped(self) -> int:
        return len(self._mappings)

    async def _copy_in_slices(self, handle: ShmHandle, ranges: Sequence[ByteRange], target: Bytes) -> None:
        source = self._map(handle)
        for at_bytes, piece in split_ranges(ranges, self._direct_bytes):
            _copy(source, [piece], target[at_bytes:])
            await asyncio.sleep(0)

    async def _copy_in_thread(self, handle: ShmHandle, ranges: Sequence[ByteRange], target: Bytes) -> None:
        stop = Event()
        copy = partial(_copy_until, stop, self._map(handle), ranges, target, self._piece_bytes)
        await run_in_thread(self._threads, copy, stop.set)

    def _map(self, handle: ShmHandle) -> Bytes:
        return self._mappings.get(handle).data


class _ShmMapping:
    """A peer's shared memory, mapped read-only. Raises TransferError ``gone`` or ``refused``."""

    def __init__(self, handle: ShmHandle) -> None:
        descriptor = _open(handle)
        try:
            _check(handle, descriptor)
            memory = mmap.mmap(descriptor, handle.length_bytes, prot=mmap.PROT_READ)
        except (OSError, ValueError, OverflowError) as error:
            raise error_of(handle, error) from error
        finally:
            os.close(descriptor)
        self.data = np.frombuffer(memory, np.uint8)

    def close(self) -> None:
        """Do nothing. The memory is unmapped with the last array that refers to it, so a copy in progress is safe."""


def _open(handle: ShmHandle) -> int:
    try:
        # The descriptor's number may be reused for a pipe, and opening that must not block.
        return os.open(descriptor_path(handle), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise error_of(handle, error) from error


def _check(handle: ShmHandle, descriptor: int) -> None:
    if os.readlink(f"/proc/self/fd/{descriptor}") != link_text(handle.name):
        raise gone_error(handle)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_size < handle.length_bytes:
        raise refused_error(handle, f"the memory has {found.st_size} bytes")
    if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & SEALS != SEALS:
        raise refused_error(handle, "the length of the memory is not sealed")


def _copy(source: Bytes, ranges: Sequence[ByteRange], target: Bytes) -> None:
    at_bytes = 0
    for each in ranges:
        start, length = each.offset_bytes, each.length_bytes
        # Like np.copyto, this releases the interpreter's lock, but it starts a third faster.
        target[at_bytes : at_bytes + length] = source[start : start + length]
        at_bytes += length


def _copy_until(stop: Event, source: Bytes, ranges: Sequence[ByteRange], target: Bytes, piece_bytes: int) -> None:
    for at_bytes, piece in split_ranges(ranges, piece_bytes):
        if stop.is_set():
            return
        _copy(source, [piece], target[at_bytes:])
