"""The adapter pool in GPU memory, written and read back through page-locked memory, beside the steps."""

from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue

import numpy as np
import torch
from blake3 import blake3

from loraserve.engine.cuda.memory import device_errors, zeros
from loraserve.engine.loading.memory import Bytes, Digest, PoolMemory

READ_BYTES = 8 << 20
"""Read back at a time by each thread."""


class DevicePool:
    """One flat tensor of the slabs' dtype, in ``memory`` where that is a GPU's. Copies run on streams of their own, so
    that no step waits for one, and none in one direction for one in the other."""

    waits = True

    def __init__(self, elements: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tensor, self.memory = zeros(elements, dtype, device)
        self._bytes = self.tensor.view(torch.uint8)
        self._pinned = device.type == "cuda"
        self._writes = torch.cuda.Stream(device) if self._pinned else None
        self._reads = torch.cuda.Stream(device) if self._pinned else None
        # As many as threads ever read at a time: to allocate page-locked memory may wait for the device.
        self._staged: SimpleQueue[torch.Tensor] = SimpleQueue()
        for stream in (self._writes, self._reads):
            if stream is not None:
                # The zeros come first: they are written on the stream that is current now.
                stream.wait_stream(torch.cuda.current_stream(device))

    def __len__(self) -> int:
        return self._bytes.numel()

    def warm_up(self, write_bytes: int, readers: int) -> None:
        """Allocate what a write of that size and that many threads that read will need. Only before the first write."""
        self.write(0, bytes(min(write_bytes, len(self))))
        for _ in range(readers):
            self._staged.put(self._page_locked(READ_BYTES))
        self.digest(blake3(), 0, min(len(self), READ_BYTES))

    def view(self, offset_bytes: int, length_bytes: int) -> None:
        return None

    def write(self, offset_bytes: int, data: Bytes) -> None:
        staged = self._page_locked(len(data))
        np.copyto(staged.numpy(), np.frombuffer(data, np.uint8))
        self._copy(self._bytes[offset_bytes : offset_bytes + len(data)], staged, self._writes)

    def digest(self, digest: Digest, offset_bytes: int, length_bytes: int) -> None:
        try:
            staged = self._staged.get_nowait()
        except Empty:
            staged = self._page_locked(READ_BYTES)
        try:
            for start in range(offset_bytes, offset_bytes + length_bytes, READ_BYTES):
                part = staged[: min(READ_BYTES, offset_bytes + length_bytes - start)]
                self._copy(part, self._bytes[start : start + len(part)], self._reads)
                digest.update(part.numpy().data)
        finally:
            self._staged.put(staged)

    def read_into(self, offset_bytes: int, into: memoryview) -> None:
        target = torch.frombuffer(into, dtype=torch.uint8)
        # In pieces, so that digests of what is loaded meanwhile get their turns on the stream.
        for start in range(0, len(target), READ_BYTES):
            part = target[start : start + READ_BYTES]
            at = offset_bytes + start
            self._copy(part, self._bytes[at : at + len(part)], self._reads)

    def _page_locked(self, length_bytes: int) -> torch.Tensor:
        return torch.empty(length_bytes, dtype=torch.uint8, pin_memory=self._pinned)

    def _copy(self, into: torch.Tensor, data: torch.Tensor, stream: "torch.cuda.Stream | None") -> None:
        if stream is None:
            into.copy_(data)
            return
        with device_errors():
            with torch.cuda.stream(stream):
                into.copy_(data, non_blocking=True)
            stream.synchronize()


# MERGED: loraserve.engine.cuda.pool
# """Memory of this machine that a GPU copies to and from by itself."""


FOR_ALL_CONTEXTS = 1
"""cudaHostRegisterPortable."""


@contextmanager
def page_locked(memory: memoryview, pool: PoolMemory) -> Iterator[None]:
    """While it lasts ``memory`` stays where it is, for copies between it and the pool's GPU. Raises RuntimeError."""
    if not isinstance(pool, DevicePool) or pool.tensor.device.type != "cuda":
        raise RuntimeError("the pool is not a GPU's")
    address = np.frombuffer(memory, np.uint8).ctypes.data
    # On another device a context would be made, of some hundred MB.
    with torch.cuda.device(pool.tensor.device):
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(address, len(memory), FOR_ALL_CONTEXTS)))
    try:
        yield
    finally:
        with torch.cuda.device(pool.tensor.device):
            torch.cuda.cudart().cudaHostUnregister(address)
