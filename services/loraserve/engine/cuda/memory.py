"""The GPU's memory: its division between KV cache and adapter pool, and copies to and from the pool."""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue

import msgspec
import numpy as np
import torch
from blake3 import blake3

from loraserve.engine.adapters.pool import ExtentAllocator
from loraserve.engine.compute.protocol import DeviceLostError
from loraserve.engine.loading.memory import Bytes, Digest, PoolMemory
from loraserve.errors import ConfigError
from loraserve.transfer.cuda_driver import CudaCallError, GpuMemory, allocate, free

SHOWN_RANKS = (8, 16, 64, 128)
MIB = 1 << 20
READ_BYTES = 8 << 20
"""Bytes that a thread copies from the GPU at a time."""
HOST_REGISTER_PORTABLE = 1
"""The flag cudaHostRegisterPortable. The memory is page-locked for all CUDA contexts."""
FATAL_PREFIXES = ("CUDA error", "Triton Error [CUDA]")
"""Prefixes of the driver's errors in torch and Triton. The next driver call reports a crashed kernel."""


@contextmanager
def device_errors() -> Iterator[None]:
    """Turn CUDA errors of the `with` block, except out-of-memory, into DeviceLostError."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if any(prefix in text for prefix in FATAL_PREFIXES) and "out of memory" not in text:
            raise DeviceLostError(text.splitlines()[0]) from error
        raise


class MeasuredMemory(msgspec.Struct, frozen=True, kw_only=True):
    """The GPU's memory after the weights are loaded.

    ``used_bytes`` includes all processes on the GPU. The largest step and graphs need ``step_bytes`` more.
    """

    total_bytes: int
    used_bytes: int
    step_bytes: int


class MemoryShares(msgspec.Struct, frozen=True, kw_only=True):
    kv_blocks: int
    pool_bytes: int


def divide_memory(
    memory: MeasuredMemory, memory_fraction: float, pool_fraction: float, block_bytes: int
) -> MemoryShares:
    """Return the sizes of KV cache and adapter pool within ``memory_fraction`` of the GPU's memory.

    The pool gets ``pool_fraction`` of the memory that weights and steps do not need. Raises ConfigError if one KV block
    and a pool of 1 MiB do not fit.
    """
    allowed = int(memory.total_bytes * memory_fraction)
    left = allowed - memory.used_bytes - memory.step_bytes
    pool_bytes = int(left * pool_fraction) // MIB * MIB
    kv_blocks = (left - pool_bytes) // block_bytes if left > 0 else 0
    if pool_bytes < MIB or kv_blocks < 1:
        raise ConfigError(
            f"GPU memory: engine.memory_fraction={memory_fraction:g} of {memory.total_bytes / MIB:.0f} MiB allows "
            f"{allowed / MIB:.0f} MiB, {memory.used_bytes / MIB:.0f} MiB are used (by weights and by other processes "
            f"on this GPU) and a step takes {memory.step_bytes / MIB:.0f} MiB, which leaves no room for the KV cache "
            "and the adapter pool; raise engine.memory_fraction, lower engine.max_step_tokens, give each engine a GPU "
            "of its own, or use a smaller model"
        )
    return MemoryShares(kv_blocks=kv_blocks, pool_bytes=pool_bytes)


def count_fitting_adapters(slab_bytes: int, pool_bytes: int, slots: int) -> int:
    extents = ExtentAllocator(pool_bytes)
    count = 0
    while count < slots and extents.allocate(slab_bytes) is not None:
        count += 1
    return count


def describe_capacity(
    shares: MemoryShares, block_tokens: int, slots: int, slab_bytes_of_rank: Mapping[int, int]
) -> str:
    """Return a log line: how many tokens fit in the KV cache, and how many adapters of each rank in the pool."""
    tokens = shares.kv_blocks * block_tokens
    counts = ", ".join(
        f"{count_fitting_adapters(slab_bytes, shares.pool_bytes, slots)} of rank {rank}"
        for rank, slab_bytes in slab_bytes_of_rank.items()
    )
    return f"KV cache for {tokens} tokens; adapter pool of {shares.pool_bytes / MIB:.0f} MiB holds {counts}"


def allocate_zeroed(elements: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, GpuMemory | None]:
    """Return a flat tensor of zeros and, on a GPU, its memory, which is freed with the last tensor that views it.

    On a GPU the tensor has its own cuMemAlloc allocation, which CUDA IPC can export and RDMA devices can register.
    torch's allocator returns a part of a larger segment. CUDA IPC would export the whole segment, or fail if torch uses
    expandable segments. Raises ConfigError if the GPU has too little memory.
    """
    if device.type != "cuda":
        return torch.zeros(elements, dtype=dtype, device=device), None
    # torch caches freed memory. Return it to the driver, which allocates the pool.
    torch.cuda.empty_cache()
    number = torch.cuda.current_device() if device.index is None else device.index
    try:
        allocation = _Allocation(allocate(elements * dtype.itemsize, number))
    except CudaCallError as error:
        raise ConfigError(
            f"GPU memory: {elements * dtype.itemsize} bytes for the adapter pool cannot be allocated ({error}); lower "
            "engine.memory_fraction or stop other processes on this GPU"
        ) from error
    tensor = torch.as_tensor(allocation, device=torch.device("cuda", number))
    return tensor.zero_().view(dtype), allocation.memory


class _Allocation:
    """Presents GPU memory to torch as a byte array. torch keeps this object while a tensor uses the memory."""

    def __init__(self, memory: GpuMemory) -> None:
        self.memory = memory
        self.__cuda_array_interface__ = {
            "shape": (memory.length_bytes,),
            "typestr": "|u1",
            "data": (memory.address, False),
            "strides": None,
            "version": 2,
        }
        # Do not free at exit: the driver may be shut down, and the process's end frees the memory.
        weakref.finalize(self, _free, memory).atexit = False


def _free(memory: GpuMemory) -> None:
    # Freeing fails if the GPU is lost. The process then has to end anyway.
    with suppress(CudaCallError):
        free(memory)


class DevicePool:
    """A PoolMemory on a device, stored as one flat tensor of the slabs' dtype.

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
        """Allocate page-locked buffers for a write and ``readers`` threads. Zeroes the pool's first ``write_bytes``."""
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
    """Page-lock host memory in the `with` block, so that the GPU can copy to and from it directly.

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
