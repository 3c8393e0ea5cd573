"""Calls to the CUDA driver API through ctypes. torch does not expose these calls and takes seconds to import.

This module shares each GPU's primary context with torch, so addresses are valid in both. Calls release the GIL.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, c_char, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_ulonglong, c_void_p
from functools import cache

import msgspec

from loraserve.errors import ConfigError, LoraServeError

LIBRARY = "libcuda.so.1"
OTHER_LIBRARY = "LORASERVE_LIBCUDA"
"""Environment variable with the path of another driver library. Tests without a GPU set it to a software driver."""
IPC_HANDLE_BYTES = 64
UUID_BYTES = 16
WHOLE_BYTES = 2 << 20
"""Allocation sizes are rounded up to this. Smaller allocations can share a block, and blocks are exported whole."""


class IpcMemHandle(ctypes.Structure):
    _fields_ = (("reserved", c_char * IPC_HANDLE_BYTES),)


class Uuid(ctypes.Structure):
    _fields_ = (("data", c_char * UUID_BYTES),)


SIGNATURES = {
    "cuInit": (c_uint,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_void_p, c_int, c_int),
    "cuDeviceGetUuid_v2": (POINTER(Uuid), c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDeviceCanAccessPeer": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemGetAddressRange_v2": (POINTER(c_uint64), POINTER(c_size_t), c_uint64),
    "cuMemGetHandleForAddressRange": (c_void_p, c_uint64, c_size_t, c_int, c_ulonglong),
    "cuFlushGPUDirectRDMAWrites": (c_int, c_int),
    "cuIpcGetMemHandle": (POINTER(IpcMemHandle), c_uint64),
    "cuIpcOpenMemHandle_v2": (POINTER(c_uint64), IpcMemHandle, c_uint),
    "cuIpcCloseMemHandle": (c_uint64,),
    "cuMemcpyHtoD_v2": (c_uint64, c_void_p, c_size_t),
    "cuMemcpyDtoH_v2": (c_void_p, c_uint64, c_size_t),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuMemcpyDtoDAsync_v2": (c_uint64, c_uint64, c_size_t, c_void_p),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamDestroy_v2": (c_void_p,),
}


class CudaCallError(LoraServeError):
    """A driver call failed. ``name`` is the driver's name of the error, such as CUDA_ERROR_OUT_OF_MEMORY."""

    def __init__(self, function: str, name: str) -> None:
        super().__init__(f"{function.partition('_v')[0]} failed with {name}")
        self.name = name


class GpuMemory(msgspec.Struct, frozen=True):
    """Memory inside one cuMemAlloc allocation on a GPU. ``device`` is the GPU's number in this process.

    torch's expandable segments are not cuMemAlloc allocations and cannot be exported.
    """

    address: int
    length_bytes: int
    device: int = 0


def call(function: str, *arguments: object) -> None:
    """Call a driver function. Raises CudaCallError, or ConfigError if there is no driver.

    Most functions must be called inside ``current_device``.
    """
    library = _started(os.environ.get(OTHER_LIBRARY, LIBRARY))
    _check(library, function, getattr(library, function)(*arguments))


@contextmanager
def current_device(device: int) -> Iterator[None]:
    """Make the GPU current for driver calls of this thread."""
    context = _primary_context(os.environ.get(OTHER_LIBRARY, LIBRARY), device)
    call("cuCtxPushCurrent_v2", context)
    try:
        yield
    finally:
        call("cuCtxPopCurrent_v2", ctypes.byref(c_void_p()))


def allocate(length_bytes: int, device: int) -> GpuMemory:
    """Allocate GPU memory in whole driver blocks, so that an export contains nothing else. Raises CudaCallError."""
    address = c_uint64()
    with current_device(device):
        call("cuMemAlloc_v2", ctypes.byref(address), -(-length_bytes // WHOLE_BYTES) * WHOLE_BYTES)
    return GpuMemory(address.value, length_bytes, device)


def free(memory: GpuMemory) -> None:
    """Free the memory after the GPU's queued work has finished."""
    with current_device(memory.device):
        call("cuMemFree_v2", memory.address)


def allocation(memory: GpuMemory) -> tuple[int, int]:
    """Return the address and the length in bytes of the allocation that contains the memory."""
    base, size = c_uint64(), c_size_t()
    with current_device(memory.device):
        call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), memory.address)
    return base.value, size.value


def device_count() -> int:
    count = c_int()
    call("cuDeviceGetCount", ctypes.byref(count))
    return count.value


def device_name(device: int) -> str:
    name = ctypes.create_string_buffer(256)
    call("cuDeviceGetName", name, len(name), _ordinal(device))
    return name.value.decode(errors="replace")


def device_uuid(device: int) -> str:
    """Return the GPU's UUID, which is the same in every process."""
    uuid = Uuid()
    call("cuDeviceGetUuid_v2", ctypes.byref(uuid), _ordinal(device))
    return bytes(uuid).hex()


def device_attribute(device: int, attribute: int) -> int:
    value = c_int()
    call("cuDeviceGetAttribute", ctypes.byref(value), attribute, _ordinal(device))
    return value.value


def can_access(device: int, other: int) -> bool:
    """Return whether the GPU ``device`` can access the memory of the GPU ``other``."""
    value = c_int()
    call("cuDeviceCanAccessPeer", ctypes.byref(value), _ordinal(device), _ordinal(other))
    return bool(value.value)


@cache
def _started(path: str) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(path)
        for name, types in SIGNATURES.items():
            getattr(library, name).argtypes = types
    except (OSError, AttributeError) as error:
        raise ConfigError(f"there is no CUDA driver, or it is older than CUDA 12 ({error})") from error
    _check(library, "cuInit", library.cuInit(0))
    return library


@cache
def _primary_context(_: str, device: int) -> int:
    """Return the GPU's primary context. It is kept until the process ends, because creating it is slow."""
    context = c_void_p()
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), _ordinal(device))
    assert context.value, "the driver returned no context"
    return context.value


def _ordinal(device: int) -> int:
    handle = c_int()
    call("cuDeviceGet", ctypes.byref(handle), device)
    return handle.value


def _check(library: ctypes.CDLL, function: str, result: int) -> None:
    if result != 0:
        name = c_char_p()
        library.cuGetErrorName(result, ctypes.byref(name))
        raise CudaCallError(function, name.value.decode() if name.value else f"CUDA error {result}")
