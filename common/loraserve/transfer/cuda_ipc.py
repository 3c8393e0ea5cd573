"""Transport between GPUs of one machine: the reader maps the owner's CUDA allocation and copies from it.

A CUDA mapping cannot be revoked. If the owner frees the memory or dies, the reader's mapping stays open and copies from
it return undefined bytes (NVIDIA's manual). Therefore the owner also keeps a descriptor open (see same_host.py). The
reader checks it before and after each copy and closes the mappings of dead owners at once.

Unit tests use a CUDA driver in software; scripts/gpu_check tests on hardware.
"""

import ctypes
import os
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from loraserve.errors import ConfigError
from loraserve.messages.transfer import TRANSFER_PROTOCOL_VERSION, CudaIpcHandle, Handle
from loraserve.threads import run_in_thread
from loraserve.transfer.cuda_driver import (
    IPC_HANDLE_BYTES,
    WHOLE_BYTES,
    CudaCallError,
    GpuMemory,
    IpcMemHandle,
    allocate,
    allocation,
    call,
    can_access,
    current_device,
    device_count,
    device_uuid,
    free,
)
from loraserve.transfer.protocol import ByteRange, TransferError, check_handle, check_read, describe
from loraserve.transfer.same_host import NAME_PREFIX, Mappings, SameHostExporter, check_offered

LAZY_PEER_ACCESS = 1
NON_BLOCKING = 1
"""The stream does not wait for other work on the GPU, such as steps."""
MAPPINGS = 64

Copy = Callable[[int, int, int, int], None]
"""Starts a copy: (target address, source address, length in bytes, stream)."""


def unusable_reason(device: int) -> str:
    """Return why other processes cannot read this GPU's memory; "" if they can. Exports a trial allocation."""
    try:
        trial = allocate(WHOLE_BYTES, device)
        try:
            _exported(trial.address, device)
        finally:
            free(trial)
    except (ConfigError, CudaCallError) as error:
        return str(error)
    return ""


class CudaIpcExporter(SameHostExporter):
    """Offers GPU memory to peers. A region lies inside one cuMemAlloc allocation, which peers map as a whole."""

    def register(self, region: GpuMemory) -> CudaIpcHandle:
        try:
            base, size = allocation(region)
            opened = _exported(base, region.device)
            gpu = device_uuid(region.device)
        except CudaCallError as error:
            raise _export_error(region, str(error)) from error
        if region.address + region.length_bytes > base + size:
            raise _export_error(region, f"its allocation ends after {base + size - region.address}")
        name = NAME_PREFIX + secrets.token_hex(16)
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
        self._descriptors.append(descriptor)
        return CudaIpcHandle(
            protocol=TRANSFER_PROTOCOL_VERSION,
            owner=self._owner,
            incarnation=self._incarnation,
            length_bytes=region.length_bytes,
            pid=os.getpid(),
            descriptor=descriptor,
            name=name,
            allocation=opened,
            offset_bytes=region.address - base,
            gpu=gpu,
        )


class CudaIpcReader:
    """Reads peers' GPU memory with the GPU ``device``. Implements `RegionReader`; use it from one event loop.

    The constructor blocks. One thread opens, copies and closes, so that no mapping is closed during a copy from it.
    """

    def __init__(self, device: int, mappings: int = MAPPINGS) -> None:
        self._device = device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cuda_ipc")
        self._mappings = Mappings(self._mapping, mappings)
        stream = ctypes.c_void_p()
        try:
            with current_device(device):
                call("cuStreamCreate", ctypes.byref(stream), NON_BLOCKING)
        except CudaCallError as error:
            raise ConfigError(f"GPU {device} cannot read: {error}; take cuda_ipc out of transfer.transports") from error
        self._stream: int = stream.value or 0

    async def read(self, handle: Handle, ranges: Sequence[ByteRange], into: memoryview) -> None:
        mine, target = check_read(handle, CudaIpcHandle, ranges, into)
        await self._read(mine, ranges, np.frombuffer(target, np.uint8).ctypes.data, _to_host)

    async def read_into(self, handle: Handle, ranges: Sequence[ByteRange], memory: GpuMemory, at_bytes: int) -> None:
        """Read the ranges into GPU memory at ``at_bytes``. Kernels launched after this returns see the bytes."""
        mine = check_handle(handle, CudaIpcHandle, ranges)
        wanted_bytes = sum(each.length_bytes for each in ranges)
        what = describe(mine, f"{wanted_bytes} bytes")
        if not 0 <= at_bytes <= memory.length_bytes - wanted_bytes:
            raise TransferError("size", f"{what}: they do not fit at {at_bytes} of {memory.length_bytes}")
        if memory.device != self._device:
            raise TransferError("refused", f"{what}: this reader is GPU {self._device}'s, not {memory.device}'s")
        await self._read(mine, ranges, memory.address + at_bytes, _to_device)

    def close(self) -> None:
        self._mappings.close()
        self._thread.submit(self._destroy)
        self._thread.shutdown(wait=True)

    @property
    def mapped(self) -> int:
        return len(self._mappings)

    async def _read(self, handle: CudaIpcHandle, ranges: Sequence[ByteRange], target: int, copy: Copy) -> None:
        mapping = self._mappings.get(handle)
        try:
            await run_in_thread(self._thread, partial(self._copy, mapping, ranges, target, copy))
        except (CudaCallError, ConfigError) as error:
            # The next read opens the memory again.
            self._mappings.drop(handle)
            # If the owner has died, report that rather than the driver's error.
            check_offered(handle)
            raise TransferError("refused", f"{describe(handle, 'a read')}: {error}; use another transport") from error
        self._mappings.check(handle)

    def _copy(self, mapping: "_Mapping", ranges: Sequence[ByteRange], target: int, copy: Copy) -> None:
        with current_device(self._device):
            source = mapping.address()
            try:
                for each in ranges:
                    if each.length_bytes:
                        copy(target, source + each.offset_bytes, each.length_bytes, self._stream)
                        target += each.length_bytes
            finally:
                # If starting a copy failed, the earlier copies may still be writing.
                call("cuStreamSynchronize", self._stream)

    def _mapping(self, handle: CudaIpcHandle) -> "_Mapping":
        return _Mapping(handle, self._device, self._thread)

    def _destroy(self) -> None:
        with current_device(self._device):
            call("cuStreamDestroy_v2", self._stream)


class _Mapping:
    """A peer's allocation, mapped on the GPU ``device`` by the first read."""

    def __init__(self, handle: CudaIpcHandle, device: int, thread: ThreadPoolExecutor) -> None:
        self._handle = handle
        self._device = device
        self._thread = thread
        self._base = 0

    def address(self) -> int:
        """Return the region's address, and map it if necessary. Call this in ``thread``, with the GPU current."""
        if not self._base:
            handle = self._handle
            if len(handle.allocation) != IPC_HANDLE_BYTES:
                raise ConfigError(f"its IPC handle has {len(handle.allocation)} bytes")
            self._check_access()
            base = ctypes.c_uint64()
            ipc_handle = IpcMemHandle.from_buffer_copy(handle.allocation)
            call("cuIpcOpenMemHandle_v2", ctypes.byref(base), ipc_handle, LAZY_PEER_ACCESS)
            self._base = base.value
            self._check_range()
        return self._base + self._handle.offset_bytes

    def close(self) -> None:
        """Unmap the memory after the copies already queued."""
        self._thread.submit(self._close)

    def _check_range(self) -> None:
        """Raise ConfigError if the region exceeds its allocation: copying it would break the process's CUDA context."""
        start, length = self._handle.offset_bytes, self._handle.length_bytes
        try:
            _, size = allocation(GpuMemory(address=self._base, length_bytes=1, device=self._device))
        except CudaCallError:
            # The driver does not report the range of mapped memory (never seen on hardware): trust the owner.
            return
        if start < 0 or start + length > size:
            raise ConfigError(f"its {length} bytes at {start} are not within the {size} that its handle opens")

    def _check_access(self) -> None:
        for other in range(device_count()):
            # If this process may not use the owner's GPU, the driver refuses the mapping.
            found = device_uuid(other) == self._handle.gpu and other != self._device
            if found and not can_access(self._device, other):
                raise ConfigError(f"GPU {self._device} cannot access the memory of GPU {other}")

    def _close(self) -> None:
        if self._base:
            with current_device(self._device):
                call("cuIpcCloseMemHandle", self._base)


def _exported(allocation_address: int, device: int) -> bytes:
    ipc_handle = IpcMemHandle()
    with current_device(device):
        call("cuIpcGetMemHandle", ctypes.byref(ipc_handle), allocation_address)
    return bytes(ipc_handle)


def _to_device(to: int, source: int, length_bytes: int, stream: int) -> None:
    call("cuMemcpyDtoDAsync_v2", to, source, length_bytes, stream)


def _to_host(to: int, source: int, length_bytes: int, stream: int) -> None:
    call("cuMemcpyDtoHAsync_v2", to, source, length_bytes, stream)


def _export_error(region: GpuMemory, why: str) -> ConfigError:
    return ConfigError(
        f"{region.length_bytes} bytes of GPU memory cannot be offered to other processes: {why}; allocate the pool "
        "with one cuMemAlloc, or take cuda_ipc out of transfer.transports"
    )
