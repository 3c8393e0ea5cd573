"""The adapter pool in GPU memory. Copies go through page-locked host memory while steps run."""

from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue

import numpy as np
import torch
from blake3 import blake3

from loraserve.engine.cuda.errors import device_errors
from loraserve.engine.cuda.memory import allocate_zeroed
from loraserve.engine.loading.memory import Bytes, Digest, PoolMemory

READ_BYTES = 8 << 20
"""Bytes that a thread copies from the GPU at a time."""
HOST_REGISTER_PORTABLE = 1
"""The flag cudaHostRegisterPortable. The memory is page-locked for all CUDA contexts."""


class DevicePool:
    """A PoolMemory on the GPU, stored as one flat tensor of the slabs' dtype.

    Writes and reads have separate streams, so steps do not wait for copies and the two directions do not wait for each
    other. ``memory`` is None if the device is not a GPU.
    """

    on_device = True

    def __init__(self, elements: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tensor, self.memory = allocate_zeroed(elements, dtype, device)
        self._bytes = self.tensor.view(torch.uint8)
        self._pinned = device.type == "cuda"
        self._writes = torch.cuda.Stream(device) if self._pinned else None
        self._reads = torch.cuda.Stream(device) if self._pinned else None
        # Reuse buffers, because allocating page-locked memory may wait for the device.
        self._buffers: SimpleQueue[torch.Tensor] = SimpleQueue()
        for stream in (self._writes, self._reads):
            if stream is not None:
                # The current stream may still be writing the zeros.
                stream.wait_stream(torch.cuda.current_stream(device))

    def __len__(self) -> int:
        return self._bytes.numel()

    def warm_up(self, write_bytes: int, readers: int) -> None:
        """Allocate buffers for writes of ``write_bytes`` and ``readers`` threads, before the first write."""
        self.write(0, bytes(min(write_bytes, len(self))))
        for _ in range(readers):
            self._buffers.put(self._page_locked(READ_BYTES))
        self.digest(blake3(), 0, min(len(self), READ_BYTES))

    def view(self, offset_bytes: int, length_bytes: int) -> None:
        return None

    def write(self, offset_bytes: int, data: Bytes) -> None:
        buffer = self._page_locked(len(data))
        np.copyto(buffer.numpy(), np.frombuffer(data, np.uint8))
        self._copy(self._bytes[offset_bytes : offset_bytes + len(data)], buffer, self._writes)

    def digest(self, digest: Digest, offset_bytes: int, length_bytes: int) -> None:
        try:
            buffer = self._buffers.get_nowait()
        except Empty:
            buffer = self._page_locked(READ_BYTES)
        try:
            for start in range(offset_bytes, offset_bytes + length_bytes, READ_BYTES):
                part = buffer[: min(READ_BYTES, offset_bytes + length_bytes - start)]
                self._copy(part, self._bytes[start : start + len(part)], self._reads)
                digest.update(part.numpy().data)
        finally:
            self._buffers.put(buffer)

    def read_into(self, offset_bytes: int, into: memoryview) -> None:
        target = torch.frombuffer(into, dtype=torch.uint8)
        # Copy READ_BYTES at a time, so that digests of loading slabs can use the stream in between.
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


@contextmanager
def page_locked(memory: memoryview, pool: PoolMemory) -> Iterator[None]:
    """Page-lock host memory during the context, so that the GPU can copy to and from it directly.

    Raises RuntimeError if the pool is not in GPU memory or CUDA refuses.
    """
    if not isinstance(pool, DevicePool) or pool.tensor.device.type != "cuda":
        raise RuntimeError("the adapter pool is not in GPU memory")
    address = np.frombuffer(memory, np.uint8).ctypes.data
    # Select the device, or torch would create a context of several hundred MB on the default device.
    with torch.cuda.device(pool.tensor.device):
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(address, len(memory), HOST_REGISTER_PORTABLE)))
    try:
        yield
    finally:
        with torch.cuda.device(pool.tensor.device):
            torch.cuda.cudart().cudaHostUnregister(address)
