"""Reads between processes of one machine: the reader maps the owner's memory and copies; the owner does nothing.

Measured on 2 busy cores of a Xeon, against a plain copy of as much: the copy itself 0.95 to 1.1 from a mapping that
was read before, 0.7 where each page is touched first (so mappings are kept; populating them ahead of the copy gave
0.8), 0.4 to 0.8 with preadv instead. A read adds some 0.04 ms, several times what it takes while its code is
in the caches, which a copy clears; half of it is to look whether the memory is still offered. Beyond SLICED_BYTES a
thread has to wake.
"""

import asyncio
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Event

import numpy as np
import numpy.typing as npt

from loraserve.threads import in_thread
from loraserve.transfer.mapping import Mapping, Mappings
from loraserve.transfer.near import NearExporter
from loraserve.transfer.protocol import PROTOCOL, Handle, Range, ShmHandle, checked, pieces
from loraserve.transfer.shared_memory import SharedMemory

DIRECT_BYTES = 4 << 20
"""So much the event loop's thread copies at once, for 0.2 ms a MiB."""
SLICED_BYTES = 32 << 20
"""Up to here it does the whole copy, and gives others their turn after every DIRECT_BYTES. That costs a twentieth;
another thread takes 0.15 to 2 ms to wake and to report where cores are busy, for 16 MiB a third of the copy."""
PIECE_BYTES = 256 << 20
"""Between pieces a copy notices that it was cancelled. Shorter ones were up to twice as slow for a slab of 256 MiB:
the C library writes past the caches only where one copy is larger than they are."""
THREADS = 2
MAPPINGS = 64

Bytes = npt.NDArray[np.uint8]


class ShmExporter(NearExporter):
    """See Exporter. A region is a SharedMemory."""

    def register(self, region: SharedMemory) -> ShmHandle:
        descriptor = region.export()
        self._descriptors.append(descriptor)
        return ShmHandle(
            protocol=PROTOCOL,
            owner=self._owner,
            incarnation=self._incarnation,
            length_bytes=region.length_bytes,
            pid=os.getpid(),
            descriptor=descriptor,
            name=region.name,
        )


class ShmReader:
    """See Reader. Used from one event loop; large copies run in threads, beside it."""

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
        self._mappings = Mappings(Mapping, mappings)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="shm")

    async def read(self, handle: Handle, ranges: Sequence[Range], into: memoryview) -> None:
        mine, memory = checked(handle, ShmHandle, ranges, into)
        target = np.frombuffer(memory, np.uint8)
        if target.nbytes <= self._direct_bytes:
            _copy_at_once(self._mapped(mine), ranges, target)
            return
        if target.nbytes <= self._sliced_bytes:
            await self._copy_by_slices(mine, ranges, target)
        else:
            await self._copy_beside(mine, ranges, target)
        # Once more, and with nothing in hand of what may be gone: an error that somebody keeps would keep it mapped.
        self._mappings.check(mine)

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._mappings.close()

    @property
    def mapped(self) -> int:
        """How many peers' memories are mapped."""
        return len(self._mappings)

    async def _copy_by_slices(self, handle: ShmHandle, ranges: Sequence[Range], target: Bytes) -> None:
        source = self._mapped(handle)
        for at_bytes, each in pieces(ranges, self._direct_bytes):
            _copy_at_once(source, [each], target[at_bytes:])
            await asyncio.sleep(0)

    async def _copy_beside(self, handle: ShmHandle, ranges: Sequence[Range], target: Bytes) -> None:
        stop = Event()
        copy = partial(_copy, self._mapped(handle), ranges, target, self._piece_bytes, stop)
        await in_thread(self._threads, copy, stop.set)

    def _mapped(self, handle: ShmHandle) -> Bytes:
        return self._mappings.get(handle).data


def _copy_at_once(source: Bytes, ranges: Sequence[Range], target: Bytes) -> None:
    at_bytes = 0
    for each in ranges:
        start, length = each.offset_bytes, each.length_bytes
        # Begins in two thirds of copyto's time, and also goes without the interpreter's lock.
        target[at_bytes : at_bytes + length] = source[start : start + length]
        at_bytes += length


def _copy(source: Bytes, ranges: Sequence[Range], target: Bytes, piece_bytes: int, stop: Event) -> None:
    for at_bytes, each in pieces(ranges, piece_bytes):
        if stop.is_set():
            return
        # Without the interpreter's lock.
        _copy_at_once(source, [each], target[at_bytes:])
