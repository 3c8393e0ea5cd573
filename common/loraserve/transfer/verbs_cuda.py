"""A GPU's memory for an RDMA device: the CUDA driver's part of it."""

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loraserve.errors import ConfigError
from loraserve.transfer.cuda_driver import CudaFailed, GpuMemory, call, current, device_attribute

WRITES_ORDERING = 118
DMA_BUF_SUPPORTED = 124
DMA_BUF_DESCRIPTOR = 1
CURRENT_CONTEXT = 0
TO_OWNER = 100
PEERMEM = Path("/sys/module/nvidia_peermem")


def dma_buf_works(device: int) -> bool:
    """Whether the GPU can hand its memory out as a dma-buf."""
    try:
        return bool(device_attribute(device, DMA_BUF_SUPPORTED))
    except (ConfigError, CudaFailed):
        return False


def peermem_works() -> bool:
    """Whether a GPU's addresses can be registered as if they were the host's."""
    return PEERMEM.exists()


@contextmanager
def dma_buf(memory: GpuMemory) -> Iterator[tuple[int, int]]:
    """A descriptor, and where in it the memory begins. What is registered with it outlives it."""
    start = memory.address // mmap.PAGESIZE * mmap.PAGESIZE
    end = -(-(memory.address + memory.length_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
    descriptor = ctypes.c_int(-1)
    try:
        with current(memory.device):
            call("cuMemGetHandleForAddressRange", ctypes.byref(descriptor), start, end - start, DMA_BUF_DESCRIPTOR, 0)
    except CudaFailed as error:
        raise ConfigError(
            f"a GPU's memory cannot be registered: {error}; the pool must be one cuMemAlloc, and the driver one with "
            "open kernel modules"
        ) from error
    try:
        yield descriptor.value, memory.address - start
    finally:
        os.close(descriptor.value)


def flush_remote_writes(device: int) -> None:
    """What was written into the GPU's memory from outside is seen by kernels that are launched after this."""
    if device_attribute(device, WRITES_ORDERING) < TO_OWNER:
        with current(device):
            call("cuFlushGPUDirectRDMAWrites", CURRENT_CONTEXT, TO_OWNER)
