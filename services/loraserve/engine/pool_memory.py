"""The adapter pool's memory as the loader sees it: slabs are written into it and read back to be verified."""

from typing import Protocol, runtime_checkable

import numpy as np

from loraserve.adapter.format import SlabHeader
from loraserve.transfer.cuda_driver import GpuMemory
from loraserve.transfer.shared_memory import SharedMemory

Bytes = memoryview | bytes | bytearray


class Digest(Protocol):
    """A hash that is being computed."""

    def update(self, data: Bytes, /) -> object: ...


class PoolMemory(Protocol):
    """Bytes of one pool. Calls from several threads are fine where none writes what another writes or reads.

    What cannot be reached any more raises DeviceLost.
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
