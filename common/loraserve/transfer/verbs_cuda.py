"""A GPU's memory for an RDMA device: the CUDA driver's part of it. No torch; the process's current context is used."""

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import msgspec

from loraserve.errors import ConfigError

DMA_BUF_SUPPORTED = 124
DMA_BUF_DESCRIPTOR = 1
CURRENT_CONTEXT = 0
TO_OWNER = 100
PEERMEM = Path("/sys/module/nvidia_peermem")


class GpuMemory(msgspec.Struct, frozen=True):
    """Of one cuMemAlloc: what torch's expandable segments give cannot be registered as one."""

    address: int
    length_bytes: int


def dma_buf_works() -> bool:
    """Whether the current context's GPU can hand its memory out as a dma-buf."""
    try:
        driver = _driver()
    except ConfigError:
        return False
    device, value = ctypes.c_int(), ctypes.c_int()
    if driver.cuCtxGetDevice(ctypes.byref(device)) != 0:
        return False
    return driver.cuDeviceGetAttribute(ctypes.byref(value), DMA_BUF_SUPPORTED, device) == 0 and bool(value.value)


def peermem_works() -> bool:
    """Whether a GPU's addresses can be registered as if they were the host's."""
    return PEERMEM.exists()


@contextmanager
def dma_buf(memory: GpuMemory) -> Iterator[tuple[int, int]]:
    """A descriptor, and where in it the memory begins. What is registered with it outlives it."""
    start = memory.address // mmap.PAGESIZE * mmap.PAGESIZE
    end = -(-(memory.address + memory.length_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
    descriptor = ctypes.c_int(-1)
    _check(
        "cuMemGetHandleForAddressRange",
        _driver().cuMemGetHandleForAddressRange(
            ctypes.byref(descriptor),
            ctypes.c_uint64(start),
            ctypes.c_size_t(end - start),
            DMA_BUF_DESCRIPTOR,
            ctypes.c_uint64(0),
        ),
    )
    try:
        yield descriptor.value, memory.address - start
    finally:
        os.close(descriptor.value)


def flush_remote_writes() -> None:
    """What was written into the GPU's memory from outside is seen by kernels that are launched after this."""
    _check("cuFlushGPUDirectRDMAWrites", _driver().cuFlushGPUDirectRDMAWrites(CURRENT_CONTEXT, TO_OWNER))


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise ConfigError(
            f"a GPU's memory cannot be registered: no CUDA driver ({error}); take verbs out of transfer.transports"
        ) from error


def _check(call: str, result: int) -> None:
    if result != 0:
        raise ConfigError(
            f"a GPU's memory cannot be registered: {call} failed with CUDA error {result}; "
            "the pool must be one cuMemAlloc in the current context, and the driver one with open kernel modules"
        )
