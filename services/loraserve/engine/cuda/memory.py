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
    """The GPU's memory after the weights are loaded.

    ``used_bytes`` includes all processes on the GPU. ``step_bytes`` is the additional memory of the largest step.
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
    """Return a log line with the number of tokens, and of adapters of each rank, that fit."""
    tokens = shares.kv_blocks * block_tokens
    counts = ", ".join(
        f"{count_fitting_adapters(slab_bytes, shares.pool_bytes, slots)} of rank {rank}"
        for rank, slab_bytes in slab_bytes_of_rank.items()
    )
    return f"KV cache for {tokens} tokens; adapter pool of {shares.pool_bytes / MIB:.0f} MiB holds {counts}"


def allocate_zeroed(elements: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, GpuMemory | None]:
    """Return a flat tensor of zeros and, on a GPU, its memory. The last tensor that views the memory frees it.

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
            f"GPU memory: {elements * dtype.itemsize} bytes for the adapter pool cannot be had ({error}); lower "
            "engine.memory_fraction or stop what else runs on this GPU"
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
