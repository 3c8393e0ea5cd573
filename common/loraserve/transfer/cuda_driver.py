"""The CUDA driver, by ctypes: no torch, which takes seconds to import and does not let its own driver calls be made.

A process shares each GPU's primary context with torch, so an address of one is an address of the other. Calls release
the interpreter's lock.
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
"""Environment variable with the path of another one: tests without a GPU name a driver in software here."""
IPC_HANDLE_BYTES = 64
UUID_BYTES = 16
WHOLE_BYTES = 2 << 20
"""What is smaller, or ends elsewhere, shares its block with other allocations, which would be exported with it."""


class IpcMemHandle(ctypes.Structure):
    """Passed by value."""

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
    """``name`` is the driver's own, as CUDA_ERROR_OUT_OF_MEMORY."""

    def __init__(self, function: str, name: str) -> None:
        super().__init__(f"{function.partition('_v')[0]} failed with {name}")
        self.name = name


class GpuMemory(msgspec.Struct, frozen=True):
    """Of one cuMemAlloc: what torch's expandable segments give cannot be given to others as one.

    ``device`` is the GPU's number as this process counts them.
    """

    address: int
    length_bytes: int
    device: int = 0


def call(function: str, *arguments: object) -> None:
    """Raises CudaFailed, and ConfigError where there is no driver. But for a few, functions need a ``current`` GPU."""
    library = _started(os.environ.get(OTHER_LIBRARY, LIBRARY))
    _check(library, function, getattr(library, function)(*arguments))


@contextmanager
def current_device(device: int) -> Iterator[None]:
    """What this thread calls is about that GPU."""
    context = _primary_context(os.environ.get(OTHER_LIBRARY, LIBRARY), device)
    call("cuCtxPushCurrent_v2", context)
    try:
        yield
    finally:
        call("cuCtxPopCurrent_v2", ctypes.byref(c_void_p()))


def allocate(length_bytes: int, device: int) -> GpuMemory:
    """In blocks of its own. Raises CudaFailed."""
    address = c_uint64()
    with current_device(device):
        call("cuMemAlloc_v2", ctypes.byref(address), -(-length_bytes // WHOLE_BYTES) * WHOLE_BYTES)
    return GpuMemory(address.value, length_bytes, device)


def free(memory: GpuMemory) -> None:
    """Waits for what the GPU has still to do."""
    with current_device(memory.device):
        call("cuMemFree_v2", memory.address)


def allocation(memory: GpuMemory) -> tuple[int, int]:
    """Address and length of the allocation that it lies in."""
    base, size = c_uint64(), c_size_t()
    with current_device(memory.device):
        call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), memory.address)
    return base.value, size.value


def device_count() -> int:
    """GPUs that this process may use."""
    count = c_int()
    call("cuDeviceGetCount", ctypes.byref(count))
    return count.value


def device_name(device: int) -> str:
    name = ctypes.create_string_buffer(256)
    call("cuDeviceGetName", name, len(name), _ordinal(device))
    return name.value.decode(errors="replace")


def device_uuid(device: int) -> str:
    """The same in every process, however each counts."""
    uuid = Uuid()
    call("cuDeviceGetUuid_v2", ctypes.byref(uuid), _ordinal(device))
    return bytes(uuid).hex()


def device_attribute(device: int, attribute: int) -> int:
    value = c_int()
    call("cuDeviceGetAttribute", ctypes.byref(value), attribute, _ordinal(device))
    return value.value


def can_access(device: int, other: int) -> bool:
    """Whether one GPU can access the other's memory."""
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
    """Kept for the process's life, as torch does: to create one takes a good part of a second."""
    context = c_void_p()
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), _ordinal(device))
    assert context.value, "a context that is none"
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
