"""Which errors of a GPU end one step, and which end the process."""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import msgspec
import torch

from loraserve.adapter.format import Dtype, make_uniform_layout
from loraserve.engine.adapters.extents import ExtentAllocator
from loraserve.engine.compute.protocol import DeviceLost
from loraserve.errors import ConfigError
from loraserve.model_shape import ModelShape
from loraserve.transfer.cuda_driver import CudaCallError, GpuMemory, allocate, free

LOST = ("CUDA error", "Triton Error [CUDA]")
"""How torch and Triton begin what the driver told them: whichever calls it next hears of a kernel that crashed."""


@contextmanager
def device_errors() -> Iterator[None]:
    """Turns what CUDA reports once and for ever into DeviceLost, whoever notices; running out of memory stays."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if any(sign in text for sign in LOST) and "out of memory" not in text:
            raise DeviceLost(text.splitlines()[0]) from error
        raise


# MERGED: loraserve.engine.cuda.memory
# """How a GPU's memory is divided, before anything of it is taken. Pure."""


SHOWN_RANKS = (8, 16, 64, 128)
MIB = 1 << 20


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """The GPU once the weights are loaded: ``used_bytes`` counts everybody's, ``step_bytes`` what a step takes more."""

    total_bytes: int
    used_bytes: int
    step_bytes: int


class Shares(msgspec.Struct, frozen=True, kw_only=True):
    """What the cache and the pool get."""

    kv_blocks: int
    pool_bytes: int


def divide(memory: Measured, memory_fraction: float, pool_fraction: float, block_bytes: int) -> Shares:
    """``memory_fraction`` of the GPU may be used; of what weights and steps leave, ``pool_fraction`` is the pool's.

    Raises ConfigError with the setting to change where not one KV block or no pool is left.
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
    return Shares(kv_blocks=kv_blocks, pool_bytes=pool_bytes)


def adapter_bytes(shape: ModelShape, dtype: Dtype, rank: int) -> int:
    """Slab of an adapter with this rank in every projection."""
    return make_uniform_layout(shape, dtype, rank).slab_bytes


def adapters_that_fit(shape: ModelShape, dtype: Dtype, pool_bytes: int, slots: int, rank: int) -> int:
    """How many adapters of this rank the pool holds at a time, as extents are given out."""
    extents = ExtentAllocator(pool_bytes)
    wanted = adapter_bytes(shape, dtype, rank)
    count = 0
    while count < slots and extents.allocate(wanted) is not None:
        count += 1
    return count


def room(
    shape: ModelShape, dtype: Dtype, shares: Shares, block_tokens: int, slots: int, ranks: Sequence[int] = SHOWN_RANKS
) -> str:
    """For the log: how many tokens and how many adapters fit."""
    tokens = shares.kv_blocks * block_tokens
    counts = ", ".join(
        f"{adapters_that_fit(shape, dtype, shares.pool_bytes, slots, rank)} of rank {rank}" for rank in ranks
    )
    return f"KV cache for {tokens} tokens; adapter pool of {shares.pool_bytes / MIB:.0f} MiB holds {counts}"


# MERGED: loraserve.engine.cuda.memory
# """Zeroed memory of a torch device that other processes and RDMA devices can be given."""


def zeros(elements: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, GpuMemory | None]:
    """A flat tensor, and where it lies if that is a GPU; free again with the last tensor that lies in it.

    On a GPU it is one cuMemAlloc of its own. What torch's allocator gives is a part of a segment, which it cuts up
    anew, or with expandable segments no such allocation at all: CUDA IPC would export its neighbours with it or refuse,
    and an RDMA device could not register it as one. Raises ConfigError where there is not as much.
    """
    if device.type != "cuda":
        return torch.zeros(elements, dtype=dtype, device=device), None
    # What torch holds without using it is free for nobody else.
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
    """What torch takes for an array of bytes that lies there, and keeps as long as it uses it."""

    def __init__(self, memory: GpuMemory) -> None:
        self.memory = memory
        self.__cuda_array_interface__ = {
            "shape": (memory.length_bytes,),
            "typestr": "|u1",
            "data": (memory.address, False),
            "strides": None,
            "version": 2,
        }
        # A process that ends gives it back anyway, and may have no driver any more by then.
        weakref.finalize(self, _free, memory).atexit = False


def _free(memory: GpuMemory) -> None:
    # Of a GPU that is lost nothing is to be had back.
    with suppress(CudaCallError):
        free(memory)
