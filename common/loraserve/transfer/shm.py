"""Reads between processes of one machine: the reader maps the owner's memory and copies; the owner does nothing.

Measured on 2 busy cores of a Xeon, against a plain copy of as much: the copy itself 0.95 to 1.1 from a mapping that
was read before, 0.7 where each page is touched first (so mappings are kept; populating them ahead of the copy gave
0.8), 0.4 to 0.8 with preadv instead. A read adds 0.05 ms, a third of it to look whether the memory is still offered,
and beyond DIRECT_BYTES what a thread takes to wake.
"""

import os
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Event

import numpy as np
import numpy.typing as npt

from loraserve.threads import in_thread
from loraserve.transfer.mapping import Mapping, there
from loraserve.transfer.protocol import PROTOCOL, Handle, Range, ShmHandle, TransferError, checked, pieces
from loraserve.transfer.shared_memory import SharedMemory

DIRECT_BYTES = 4 << 20
"""Up to here the event loop's thread copies, for 0.1 ms a MiB: another thread takes 0.15 to 0.9 ms to wake and to
report where cores are busy, and slices with turns for others between them cost a third of the bandwidth."""
PIECE_BYTES = 256 << 20
"""Between pieces a copy notices that it was cancelled. Shorter ones were up to twice as slow for a slab of 256 MiB:
the C library writes past the caches only where one copy is larger than they are."""
THREADS = 2
MAPPINGS = 64

Bytes = npt.NDArray[np.uint8]


class ShmExporter:
    """See Exporter. A region is a SharedMemory."""

    def __init__(self, owner: str, incarnation: str) -> None:
        self._owner = owner
        self._incarnation = incarnation
        self._descriptors: list[int] = []

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

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())


class ShmReader:
    """See Reader. Used from one event loop; large copies run in threads, beside it."""

    def __init__(
        self, piece_bytes: int = PIECE_BYTES, mappings: int = MAPPINGS, direct_bytes: int = DIRECT_BYTES
    ) -> None:
        self._direct_bytes = direct_bytes
        self._piece_bytes = piece_bytes
        self._most_mappings = mappings
        self._mappings: OrderedDict[ShmHandle, Mapping] = OrderedDict()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="shm")

    async def read(self, handle: Handle, ranges: Sequence[Range], into: memoryview) -> None:
        mine, target = checked(handle, ShmHandle, ranges, into)
        if target.nbytes <= self._direct_bytes:
            _copy(self._mapped(mine), ranges, np.frombuffer(target, np.uint8))
            return
        await self._copy_beside(mine, ranges, np.frombuffer(target, np.uint8))
        # Once more, and with nothing in hand of what may be gone: an error that somebody keeps would keep it mapped.
        self._check(mine)

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        for handle in list(self._mappings):
            self._drop(handle)

    @property
    def mapped(self) -> int:
        """How many peers' memories are mapped."""
        return len(self._mappings)

    async def _copy_beside(self, handle: ShmHandle, ranges: Sequence[Range], target: Bytes) -> None:
        stop = Event()
        copy = partial(_copy, self._mapped(handle), ranges, target, self._piece_bytes, stop)
        await in_thread(self._threads, copy, stop.set)

    def _mapped(self, handle: ShmHandle) -> Bytes:
        self._check(handle)
        mapping = self._mappings.get(handle)
        if mapping is None:
            mapping = Mapping(handle)
            self._mappings[handle] = mapping
            # The memory of a process that died is the machine's again at once, not at the next read.
            mapping.loop.add_reader(mapping.death, self._drop, handle)
            while len(self._mappings) > self._most_mappings:
                self._drop(next(iter(self._mappings)))
        self._mappings.move_to_end(handle)
        return mapping.data

    def _check(self, handle: ShmHandle) -> None:
        try:
            there(handle)
        except TransferError:
            self._drop(handle)
            raise

    def _drop(self, handle: ShmHandle) -> None:
        # A copy that is under way keeps what it reads.
        mapping = self._mappings.pop(handle, None)
        if mapping is not None:
            mapping.loop.remove_reader(mapping.death)
            mapping.close()


def _copy(
    source: Bytes, ranges: Sequence[Range], target: Bytes, piece_bytes: int = PIECE_BYTES, stop: Event | None = None
) -> None:
    for at_bytes, each in pieces(ranges, piece_bytes):
        if stop is not None and stop.is_set():
            return
        start, length = each.offset_bytes, each.length_bytes
        # Without the interpreter's lock.
        np.copyto(target[at_bytes : at_bytes + length], source[start : start + length])
