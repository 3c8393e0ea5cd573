"""The memory of the adapter pool, in host memory or on a device: slabs are written to it and verified in it."""

import asyncio
import ctypes
import os
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Thread
from typing import Protocol, runtime_checkable

import numpy as np
from blake3 import blake3

from loraserve.adapter.format import SlabHeader
from loraserve.device import available_memory_share
from loraserve.log import get_logger
from loraserve.threads import run_in_thread
from loraserve.transfer.cuda_driver import GpuMemory
from loraserve.transfer.shm import SharedMemory

Bytes = memoryview | bytes | bytearray

PIECES_IN_FLIGHT = 2
"""One piece is written while the next is fetched. More pieces would only use more memory."""
POPULATE_PIECE_BYTES = 8 << 20
POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE (Linux 5.14 or later): allocates pages as a write would, but keeps their contents."""
LEAST_AVAILABLE = 0.25
"""Populating stops if less than this fraction of the machine's memory is available, as other processes may need it."""
IDLE_PRIORITY = 19


class Digest(Protocol):
    def update(self, data: Bytes, /) -> object: ...


class PoolMemory(Protocol):
    """The bytes of one pool. Threads may access different ranges concurrently, and may read the same range.

    Methods raise DeviceLostError if the device's memory cannot be accessed any more.
    """

    @property
    def on_device(self) -> bool:
        """Whether the memory is on a device. If so, ``write`` blocks: call it in a thread."""
        ...

    def __len__(self) -> int: ...

    def view(self, offset_bytes: int, length_bytes: int) -> memoryview | None:
        """Return the range as a writable view; None if it is on a device."""
        ...

    def write(self, offset_bytes: int, data: Bytes) -> None:
        """Write ``data``. Steps that start after this method returns read the new bytes."""
        ...

    def digest(self, digest: Digest, offset_bytes: int, length_bytes: int) -> None: ...

    def read_into(self, offset_bytes: int, into: memoryview) -> None:
        """Fill ``into`` with the bytes starting at ``offset_bytes``."""
        ...


@runtime_checkable
class LendableDevice(Protocol):
    """A pool on a device that peers can read. ``memory`` is set if the device is a GPU."""

    memory: GpuMemory | None

    def __len__(self) -> int: ...

    def read_into(self, offset_bytes: int, into: memoryview) -> None: ...


class HostPool:
    """A pool in host memory. If ``shared`` is given, ``memory`` is a view of its beginning."""

    on_device = False

    def __init__(self, memory: memoryview, shared: SharedMemory | None = None) -> None:
        self._memory = memory
        self.shared = shared

    def __len__(self) -> int:
        return len(self._memory)

    def view(self, offset_bytes: int, length_bytes: int) -> memoryview:
        return self._memory[offset_bytes : offset_bytes + length_bytes]

    def write(self, offset_bytes: int, data: Bytes) -> None:
        # numpy releases the interpreter's lock, which the kernel calls of a step need. With rank 64, this shortened
        # the longest gap between other requests' tokens from 3.2 to 2.2 steps.
        np.copyto(np.frombuffer(self.view(offset_bytes, len(data)), np.uint8), np.frombuffer(data, np.uint8))

    def digest(self, digest: Digest, offset_bytes: int, length_bytes: int) -> None:
        digest.update(self.view(offset_bytes, length_bytes))

    def read_into(self, offset_bytes: int, into: memoryview) -> None:
        np.copyto(np.frombuffer(into, np.uint8), np.frombuffer(self.view(offset_bytes, len(into)), np.uint8))


def check_slab(header: SlabHeader, slab_dtype: str, base_elements: int, pool_elements: int) -> None:
    """Raise ValueError if the slab's dtype differs from ``slab_dtype`` or the slab does not lie inside the pool."""
    if header.dtype != slab_dtype:
        raise ValueError(f"slab is {header.dtype}, engine.slab_dtype is {slab_dtype}; register the adapter again")
    if not 0 <= base_elements <= pool_elements - header.elements:
        raise ValueError(f"slab of {header.elements} elements at {base_elements} is outside {pool_elements}")


class LayersToVerify:
    """Decides which layers to verify as the bytes of a slab arrive in order. Each layer is verified once.

    In a pool on a device, a layer is verified as soon as it is complete. In host memory, all layers are verified after
    the last byte has arrived, because steps compute on the same CPU. Verifying during the copy made loads 14% shorter,
    but the longest step during a load grew from 1.8 to 2.05 times the median (SmolLM2-135M, rank 64, 2 cores).
    """

    def __init__(self, header: SlabHeader, on_device: bool) -> None:
        self._header = header
        self._on_device = on_device
        self._next = 0

    def take(self, slab_bytes: int) -> range:
        """Return the layers to verify now that the first ``slab_bytes`` have arrived."""
        first = self._next
        if self._on_device or slab_bytes == self._header.slab_bytes:
            while self._next < self._header.shape.layers and self._header.layer(self._next).stop <= slab_bytes:
                self._next += 1
        return range(first, self._next)


def split_layers(layers: range, threads: int) -> Sequence[range]:
    """Split the layers into at most ``threads`` consecutive, non-empty ranges."""
    each = max(1, -(-len(layers) // threads))
    return [layers[start : start + each] for start in range(0, len(layers), each)]


def find_damaged_layer(memory: PoolMemory, header: SlabHeader, offset_bytes: int, layers: Iterable[int]) -> int | None:
    """Return the first of ``layers`` whose bytes in memory do not match the header's digest; None if all match."""
    for layer in layers:
        part = header.layer(layer)
        digest = blake3()
        memory.digest(digest, offset_bytes + part.start, len(part))
        if digest.digest() != header.layer_digests[layer]:
            return layer
    return None


class TransferTarget:
    """The extent that a slab is read into. The bytes arrive in order.

    ``arrived`` must be called with the total number of bytes whenever bytes have arrived. ``stream`` does this. Sources
    that write to the pool's memory without ``stream`` must call it themselves.
    """

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
        """Return the extent as a writable view; None if it is on a device."""
        return self.pool.view(self.offset_bytes, self.slab_bytes)

    async def stream(self, piece_bytes: int, fetch: Callable[[int, int], Awaitable[Bytes | None]]) -> None:
        """Fill the extent in order, with up to PIECES_IN_FLIGHT pieces in flight.

        ``fetch`` takes the start and the length of a piece in bytes. It returns the piece, or None if it has written
        the piece into the extent itself. If a piece fails, the others are cancelled and end before this raises.
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
        if self.pool.on_device:
            await run_in_thread(self._writers, write)
        else:
            write()


def populate(memory: memoryview) -> Thread:
    """Allocate the pages of a pool in a background thread, before loads need them, and return the thread.

    The first write to a page costs more than the copy. It makes the load of a 4.7 MiB slab take 17 ms instead of 3 ms
    (Linux 6.18, virtual machine, AMD EPYC). The thread has the lowest priority and does not delay the process's exit.
    """
    thread = Thread(target=_populate, args=(memory,), name="populate", daemon=True)
    thread.start()
    return thread


def _populate(memory: memoryview) -> None:
    log = get_logger(__name__)
    if sys.platform != "linux":
        # Other systems lack this madvise, and setpriority below would change the whole process.
        log.info("pool_not_populated", populated_bytes=0, reason=f"{sys.platform} cannot populate pages")
        return
    os.setpriority(os.PRIO_PROCESS, 0, IDLE_PRIORITY)  # On Linux, this affects only this thread.
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
