"""Divides a GPU's memory between KV cache and adapter pool, and allocates the pool."""

import weakref
from collections.abc import Mapping
from contextlib import suppress

import msgspec
import torch

from loraserve.adapter.format import Dtype, make_uniform_layout
from loraserve.engine.adapters.extents import ExtentAllocator
from loraserve.errors import ConfigError
from loraserve.model_shape import ModelShape
from loraserve.transfer.cuda_driver import CudaCallError, GpuMemory, allocate, free

SHOWN_RANKS = (8, 16, 64, 128)
MIB = 1 << 20


class MeasuredMemory(msgspec.Struct, frozen=True, kw_only=True):
    """The GPU's memory once the weights are loaded.

    ``used_bytes`` counts every process on the GPU; ``step_bytes`` is what the largest step needs beside that.
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
    """Return the sizes of cache and pool if ``memory_fraction`` of the GPU may be used.

    The pool gets ``pool_fraction`` of what weights and steps leave. Raises ConfigError with the settings to change if
    there is no room for one KV block and a pool.
    """
    allowed = int(memory.total_bytes * memory_fraction)
    left = allowed - memory.used_bytes - memory.step_bytes
    pool_bytes = int(left * pool_fraction) // MIB * MIB
    kv_blocks = (left - pool_bytes) // block_bytes if left > 0 else 0
    if pool_bytes < MIB or kv_blocks < 1:
        raise ConfigError(
            f"GPU memory: engine.memory_fraction={memory_fraction:g} of {memory.total_bytes / MIB:.0f} MiB allows "
            f"{allowed / MIB:.0f} MiB, {memory.used_bytes / MIB:.0f} MiB are used (weights, and whatever else runs on "
            f"this GPU) and a step takes {memory.step_bytes / MIB:.0f} MiB, which leaves no room for the KV cache and "
            "the adapter pool; raise engine.memory_fraction, lower engine.max_step_tokens, give each engine a GPU of "
            "its own, or use a smaller model"
        )
    return MemoryShares(kv_blocks=kv_blocks, pool_bytes=pool_bytes)


def adapter_bytes(shape: ModelShape, dtype: Dtype, rank: int) -> int:
    return make_uniform_layout(shape, dtype, rank).slab_bytes


def count_fitting_adapters(slab_bytes: int, pool_bytes: int, slots: int) -> int:
    extents = ExtentAllocator(pool_bytes)
    count = 0
    while count < slots and extents.allocate(slab_bytes) is not None:
        count += 1
    return count


def describe_capacity(
    shares: MemoryShares, block_tokens: int, slots: int, slab_bytes_of_rank: Mapping[int, int]
) -> str:
    """Return a line for the log: how many tokens, and how many adapters of each rank, fit."""
    tokens = shares.kv_blocks * block_tokens
    counts = ", ".join(
        f"{count_fitting_adapters(slab_bytes, shares.pool_bytes, slots)} of rank {rank}"
        for rank, slab_bytes in slab_bytes_of_rank.items()
    )
    return f"KV cache for {tokens} tokens; adapter pool of {shares.pool_bytes / MIB:.0f} MiB holds {counts}"


def allocate_zeroed(elements: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, GpuMemory | None]:
    """Return a flat tensor of zeros and, on a GPU, its memory, which is freed with the last tensor that views it.

    On a GPU the tensor is one cuMemAlloc of its own, so that other processes and RDMA devices can be given it. Memory
    from torch's allocator is part of a segment that is divided again later, or with expandable segments no such
    allocation at all: CUDA IPC would export its neighbours with it or refuse, and an RDMA device could not register it
    as one region. Raises ConfigError if the GPU has too little memory.
    """
    if device.type != "cuda":
        return torch.zeros(elements, dtype=dtype, device=device), None
    # torch keeps freed memory, which the driver cannot allocate until it is returned.
    torch.cuda.empty_cache()
    number = torch.cuda.current_device() if device.index is None else device.index
    try:
        allocation = _Allocation(allocate(elements * dtype.itemsize, number))
    except CudaCallError as error:
        raise ConfigError(
            f"GPU memory: {elements * dtype.itemsize} bytes for the adapter pool cannot be had ({error}); lower "
            "engine.memory_fraction or stop what else runs on this GPU"
        ) from error
    tensor = torch.as_tensor(allocation, device=torch.device("cuda", number))
    return tensor.zero_().view(dtype), allocation.memory


class _Allocation:
    """Presents GPU memory to torch as an array of bytes. torch keeps the object as long as a tensor uses the memory."""

    def __init__(self, memory: GpuMemory) -> None:
        self.memory = memory
        self.__cuda_array_interface__ = {
            "shape": (memory.length_bytes,),
            "typestr": "|u1",
            "data": (memory.address, False),
            "strides": None,
            "version": 2,
        }
        # The end of the process frees the memory anyway, and the driver may be gone by then.
        weakref.finalize(self, _free, memory).atexit = False


def _free(memory: GpuMemory) -> None:
    # Freeing fails on a lost GPU, where there is nothing to gain from it.
    with suppress(CudaCallError):
        free(memory)
