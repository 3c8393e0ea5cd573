"""The adapter pool's memory as the loader sees it: slabs are written into it and read back to be verified."""

import asyncio
import ctypes
import os
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


class Digest(Protocol):
    """A hash that is being computed."""

    def update(self, data: Bytes, /) -> object: ...


class PoolMemory(Protocol):
    """Bytes of one pool. Calls from several threads are fine where none writes what another writes or reads.

    What cannot be reached any more raises DeviceLostError.
    """

    @property
    def waits(self) -> bool:
        """``write`` waits for a device: an event loop calls it in a thread."""
        ...

    def __len__(self) -> int: ...

    def view(self, offset_bytes: int, length_bytes: int) -> memoryview | None:
        """These bytes, to be written to as memory of this process; None where they are a device's."""
        ...

    def write(self, offset_bytes: int, data: Bytes) -> None:
        """Returns when the bytes are there for whatever computes next."""
        ...

    def digest(self, digest: Digest, offset_bytes: int, length_bytes: int) -> None:
        """Feed what lies there to ``digest``."""
        ...

    def read_into(self, offset_bytes: int, into: memoryview) -> None:
        """Fill ``into`` with what lies there; returns when it is all there."""
        ...


@runtime_checkable
class LendableDevice(Protocol):
    """A pool on a device that peers can read. ``memory`` is where it lies, if that is a GPU."""

    memory: GpuMemory | None

    def __len__(self) -> int: ...

    def read_into(self, offset_bytes: int, into: memoryview) -> None:
        """Fill ``into`` with what lies there; returns when it is all there."""
        ...


class HostPool:
    """A pool in this machine's memory; ``shared`` is what it lies in at the beginning of, where peers can map that."""

    waits = False

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
    """Raises ValueError where the slab is of another dtype than the pool, or would not lie within it."""
    if header.dtype != slab_dtype:
        raise ValueError(f"slab is {header.dtype}, engine.slab_dtype is {slab_dtype}; register the adapter again")
    if not 0 <= base_elements <= pool_elements - header.elements:
        raise ValueError(f"slab of {header.elements} elements at {base_elements} is outside {pool_elements}")


PIECE_BYTES = 8 << 20
POPULATE_WRITE = 23
"""madvise's, since Linux 5.14: takes the pages as a write would, and leaves what is in them."""
LEAST_AVAILABLE = 0.25
"""Of the memory that there is. Below that pages are taken when they are needed, as others may need them sooner."""
IDLE = 19
"""The priority that steps leave something to."""


def populate(memory: memoryview) -> Thread:
    """In a thread of the lowest priority, as far as there is memory to spare; it goes with the process."""
    thread = Thread(target=_populate, args=(memory,), name="populate", daemon=True)
    thread.start()
    return thread


def _populate(memory: memoryview) -> None:
    os.setpriority(os.PRIO_PROCESS, 0, IDLE)
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for start in range(0, memory.nbytes, PIECE_BYTES):
        reason = ""
        if available_memory_share() < LEAST_AVAILABLE:
            reason = "little memory is available"
        elif madvise(begin + start, min(PIECE_BYTES, memory.nbytes - start), POPULATE_WRITE):
            reason = os.strerror(ctypes.get_errno())
        if reason:
            get_logger(__name__).info("pool_not_populated", populated_bytes=start, reason=reason)
            return


PIECES_IN_FLIGHT = 2
"""One is copied while the next is on its way; more would only hold memory."""


class Landing:
    """``arrived`` hears how many bytes of the slab are there, whenever there are more."""

    def __init__(
        self,
        pool: PoolMemory,
        offset_bytes: int,
        slab_bytes: int,
        arrived: Callable[[int], None],
        writers: ThreadPoolExecutor,
    ) -> None:
        self.pool = pool
        self.offset_bytes = offset_bytes
        self.slab_bytes = slab_bytes
        self.arrived = arrived
        self._writers = writers

    def view(self) -> memoryview | None:
        """The extent as memory of this process; None where it is a device's."""
        return self.pool.view(self.offset_bytes, self.slab_bytes)

    async def stream(self, piece_bytes: int, fetch: Callable[[int, int], Awaitable[Bytes | None]]) -> None:
        """Everything, by pieces in order, a few in flight: ``fetch`` brings those of a start and a length, or None
        where it has put them in their place itself.

        A failing piece ends the whole: the others are cancelled, and are over when this ends.
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
                self.arrived(start + length)
        finally:
            for _, _, piece in waiting:
                piece.cancel()
            await asyncio.gather(*(piece for _, _, piece in waiting), return_exceptions=True)

    async def _write(self, start: int, data: Bytes) -> None:
        write = partial(self.pool.write, self.offset_bytes + start, data)
        if self.pool.waits:
            await run_in_thread(self._writers, write)
        else:
            write()
