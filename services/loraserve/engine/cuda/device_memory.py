"""Zeroed memory of a torch device that other processes and RDMA devices can be given."""

import weakref
from contextlib import suppress

import torch

from loraserve.errors import ConfigError
from loraserve.transfer.cuda_driver import CudaFailed, GpuMemory, allocate, free


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
    except CudaFailed as error:
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
    with suppress(CudaFailed):
        free(memory)
