"""The memory of the adapter pool as the loader sees it, and how a slab is written into it.

Slabs are written into the pool and read back to be verified. The pool lies in this machine's memory or on a device.
"""

import asyncio
import ctypes
import os
import sys
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Thread
from typing import Protocol, runtime_checkable

import numpy as np

from loraserve.adapter.format import SlabHeader
from loraserve.device import available_memory_share
from loraserve.log import get_logger
from loraserve.threads import run_in_thread
from loraserve.transfer.cuda_driver import GpuMemory
from loraserve.transfer.shm import SharedMemory

Bytes = memoryview | bytes | bytearray

PIECES_IN_FLIGHT = 2
"""One piece is written while the next is on its way; more would only hold memory."""
POPULATE_PIECE_BYTES = 8 << 20
POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE of Linux 5.14 and later: takes the pages as a write would and keeps what is in them."""
LEAST_AVAILABLE = 0.25
"""Pages are populated while at least this share of the machine's memory is available; others may need the rest."""
IDLE_PRIORITY = 19


class Digest(Protocol):
    def update(self, data: Bytes, /) -> object: ...


class PoolMemory(Protocol):
    """The bytes of one pool. Threads may call it at the same time if none writes what another reads or writes.

    Raises DeviceLostError if the memory cannot be reached any more.
    """

    @property
    def on_device(self) -> bool:
        """Whether the memory is a device's: ``write`` waits for it, so an event loop calls it in a thread."""
        ...

    def __len__(self) -> int: ...

    def view(self, offset_bytes: int, length_bytes: int) -> memoryview | None:
        """Return these bytes as writable memory of this process; None if they are on a device."""
        ...

    def write(self, offset_bytes: int, data: Bytes) -> None:
        """Write ``data``; return when later computations see it."""
        ...

    def digest(self, digest: Digest, offset_bytes: int, length_bytes: int) -> None: ...

    def read_into(self, offset_bytes: int, into: memoryview) -> None:
        """Fill ``into`` with the bytes from ``offset_bytes`` on."""
        ...


@runtime_checkable
class LendableDevice(Protocol):
    """A pool on a device that peers can read. ``memory`` is set if the device is a GPU."""

    memory: GpuMemory | None

    def __len__(self) -> int: ...

    def read_into(self, offset_bytes: int, into: memoryview) -> None: ...


class HostPool:
    """A pool in this machine's memory. ``shared`` is the shared memory whose first bytes it is, if any."""

    on_device = False

    def __init__(self, memory: memoryview, shared: SharedMemory | None = None) -> None:
        self._memory = memory
        self.shared = shared

    def __len__(self) -> int:
        return len(self._memory)

    def view(self, offset_bytes: int, length_bytes: int) -> memoryview:
        return self._memory[offset_bytes : offset_bytes + length_bytes]

    def write(self, offset_bytes: int, data: Bytes) -> None:
        # numpy copies without the interpreter's lock, which each of a step's kernel calls needs: measured with rank
        # 64, the longest gap between others' tokens is 2.2 steps instead of 3.2.
        np.copyto(np.frombuffer(self.view(offset_bytes, len(data)), np.uint8), np.frombuffer(data, np.uint8))

    def digest(self, digest: Digest, offset_bytes: int, length_bytes: int) -> None:
        digest.update(self.view(offset_bytes, length_bytes))

    def read_into(self, offset_bytes: int, into: memoryview) -> None:
        np.copyto(np.frombuffer(into, np.uint8), np.frombuffer(self.view(offset_bytes, len(into)), np.uint8))


def check_slab(header: SlabHeader, slab_dtype: str, base_elements: int, pool_elements: int) -> None:
    """Raise ValueError if the slab has another dtype than the pool, or would not lie within it."""
    if header.dtype != slab_dtype:
        raise ValueError(f"slab is {header.dtype}, engine.slab_dtype is {slab_dtype}; register the adapter again")
    if not 0 <= base_elements <= pool_elements - header.elements:
        raise ValueError(f"slab of {header.elements} elements at {base_elements} is outside {pool_elements}")


class TransferTarget:
    """The extent that a slab is read into, from its beginning on.

    A source calls ``advance`` with the number of bytes that have arrived, whenever there are more.
    """

    def __init__(
        self,
        pool: PoolMemory,
        offset_bytes: int,
        slab_bytes: int,
        advance: Callable[[int], None],
        writers: ThreadPoolExecutor,
    ) -> None:
        self.pool = pool
        self.offset_bytes = offset_bytes
        self.slab_bytes = slab_bytes
        self.advance = advance
        self._writers = writers

    def view(self) -> memoryview | None:
        """Return the extent as memory of this process; None if it is on a device."""
        return self.pool.view(self.offset_bytes, self.slab_bytes)

    async def stream(self, piece_bytes: int, fetch: Callable[[int, int], Awaitable[Bytes | None]]) -> None:
        """Fill the extent piece by piece, in order, with a few pieces in flight.

        ``fetch`` takes the start and the length of a piece and returns its bytes, or None if it has put them into the
        extent itself. A piece that fails ends the transfer; the others are cancelled and have ended when this returns.
        """
        waiting: deque[tuple[int, int, asyncio.Future[Bytes | None]]] = deque()
        starts = iter(range(0, self.slab_bytes, piece_bytes))
        try:
            while True:
                while len(waiting) < PIECES_IN_FLIGHT and (start := next(starts, None)) is not None:
                    length = min(piece_bytes, self.slab_bytes - start)
                    waiting.append((start, length, asyncio.ensure_future(fetch(start, length))))
                if not waiting:
                    return
                start, length, piece = waiting.popleft()
                data = await piece
                if data is not None:
                    await self._write(start, data)
                self.advance(start + length)
        finally:
            for _, _, piece in waiting:
                piece.cancel()
            await asyncio.gather(*(piece for _, _, piece in waiting), return_exceptions=True)

    async def _write(self, start: int, data: Bytes) -> None:
        write = partial(self.pool.write, self.offset_bytes + start, data)
        if self.pool.on_device:
            await run_in_thread(self._writers, write)
        else:
            write()


def populate(memory: memoryview) -> Thread:
    """Take the pages of a pool in a background thread before the first loads need them; return the thread.

    The first write to a page costs more than the copy itself: for a slab of 4.7 MiB 17 ms instead of 3 (Linux 6.18 in a
    virtual machine, AMD EPYC), once for each extent. The thread has the lowest priority, and the process does not wait
    for it to exit.
    """
    thread = Thread(target=_populate, args=(memory,), name="populate", daemon=True)
    thread.start()
    return thread


def _populate(memory: memoryview) -> None:
    log = get_logger(__name__)
    if sys.platform != "linux":
        # Elsewhere the priority below would be that of the whole process, and there is no such madvise.
        log.info("pool_not_populated", populated_bytes=0, reason=f"{sys.platform} cannot populate pages")
        return
    os.setpriority(os.PRIO_PROCESS, 0, IDLE_PRIORITY)  # Linux: of this thread alone
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for start in range(0, memory.nbytes, POPULATE_PIECE_BYTES):
        reason = ""
        if available_memory_share() < LEAST_AVAILABLE:
            reason = "little memory is available"
        elif madvise(begin + start, min(POPULATE_PIECE_BYTES, memory.nbytes - start), POPULATE_WRITE):
            reason = os.strerror(ctypes.get_errno())
        if reason:
            log.info("pool_not_populated", populated_bytes=start, reason=reason)
            return
