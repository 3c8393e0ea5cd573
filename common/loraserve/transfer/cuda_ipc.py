"""Reads from GPU to GPU between processes of one machine: the reader maps the owner's allocation and copies.

What CUDA opens cannot be taken back: memory that its owner freed or died with stays mapped here until it is closed, and
what a copy from it finds is anything (NVIDIA's manual calls it undefined). So the owner also holds a descriptor (see
NearHandle), which is looked at before and after each copy, and mappings of the dead are closed at once. That an owner
reuses no extent while it is read is a lease's promise, and that the bytes are the right ones the digest's.

On hardware: not yet (scripts/gpu_check does it); tests run it on a CUDA driver in software.
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
"""A stream that does not wait for what others do on the GPU, steps above all."""
MAPPINGS = 64

Copy = Callable[[int, int, int, int], None]
"""(to, source, length in bytes, stream): begins it."""


def unusable_reason(device: int) -> str:
    """Why that GPU's memory cannot be read by other processes; empty where it can. Tried: no attribute says it."""
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
    """See Exporter. A region lies in one cuMemAlloc, which peers map as a whole."""

    def register(self, region: GpuMemory) -> CudaIpcHandle:
        """Raises ConfigError."""
        try:
            base, size = allocation(region)
            opens = _exported(base, region.device)
            gpu = device_uuid(region.device)
        except CudaCallError as error:
            raise _cannot(region, str(error)) from error
        if region.address + region.length_bytes > base + size:
            raise _cannot(region, f"its allocation ends after {base + size - region.address}")
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
            allocation=opens,
            offset_bytes=region.address - base,
            gpu=gpu,
        )


class CudaIpcReader:
    """See Reader. Used from one event loop. ``device`` is the GPU that copies, and that ``read_into`` copies to.

    Blocks while it is made. One thread opens, copies and closes: what is being copied from is not closed meanwhile.
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
        """The same into memory of ``device``: what is launched after this sees it."""
        mine = check_handle(handle, CudaIpcHandle, ranges)
        wanted_bytes = sum(each.length_bytes for each in ranges)
        what = describe(mine, f"{wanted_bytes} bytes")
        if not 0 <= at_bytes <= memory.length_bytes - wanted_bytes:
            raise TransferError("size", f"{what}: no room for them at {at_bytes} of {memory.length_bytes}")
        if memory.device != self._device:
            raise TransferError("refused", f"{what}: this reader is GPU {self._device}'s, not {memory.device}'s")
        await self._read(mine, ranges, memory.address + at_bytes, _to_device)

    def close(self) -> None:
        self._mappings.close()
        self._thread.submit(self._destroy)
        self._thread.shutdown(wait=True)

    @property
    def mapped(self) -> int:
        """How many peers' memories are mapped."""
        return len(self._mappings)

    async def _read(self, handle: CudaIpcHandle, ranges: Sequence[ByteRange], target: int, copy: Copy) -> None:
        mapping = self._mappings.get(handle)
        try:
            await run_in_thread(self._thread, partial(self._copy, mapping, ranges, target, copy))
        except (CudaCallError, ConfigError) as error:
            # Opened anew for the next read.
            self._mappings.drop(handle)
            # An owner that went away is gone, whatever the driver calls it.
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
                # Also when one could not be begun: those before it still write.
                call("cuStreamSynchronize", self._stream)

    def _mapping(self, handle: CudaIpcHandle) -> "_Mapping":
        return _Mapping(handle, self._device, self._thread)

    def _destroy(self) -> None:
        with current_device(self._device):
            call("cuStreamDestroy_v2", self._stream)


class _Mapping:
    """A peer's allocation as the GPU ``device`` sees it, opened when it is first read."""

    def __init__(self, handle: CudaIpcHandle, device: int, thread: ThreadPoolExecutor) -> None:
        self._handle = handle
        self._device = device
        self._thread = thread
        self._base = 0

    def address(self) -> int:
        """Where the region begins. In the thread, where the GPU is current."""
        if not self._base:
            handle = self._handle
            if len(handle.allocation) != IPC_HANDLE_BYTES:
                raise ConfigError(f"its handle is of {len(handle.allocation)} bytes")
            self._check_reach()
            base = ctypes.c_uint64()
            opens = IpcMemHandle.from_buffer_copy(handle.allocation)
            call("cuIpcOpenMemHandle_v2", ctypes.byref(base), opens, LAZY_PEER_ACCESS)
            self._base = base.value
            self._check_range()
        return self._base + self._handle.offset_bytes

    def close(self) -> None:
        """Behind the copies that are to be made from it."""
        self._thread.submit(self._close)

    def _check_range(self) -> None:
        """What is copied from outside an allocation ends this process's use of its GPU."""
        start, length = self._handle.offset_bytes, self._handle.length_bytes
        try:
            _, size = allocation(GpuMemory(address=self._base, length_bytes=1, device=self._device))
        except CudaCallError:
            # Not seen on hardware: a driver that does not say this of mapped memory leaves the owner's word.
            return
        if start < 0 or start + length > size:
            raise ConfigError(f"its {length} bytes at {start} are not within the {size} that its handle opens")

    def _check_reach(self) -> None:
        for other in range(device_count()):
            # One that this process may not use is the driver's to refuse.
            found = device_uuid(other) == self._handle.gpu and other != self._device
            if found and not can_access(self._device, other):
                raise ConfigError(f"GPU {self._device} cannot access the memory of GPU {other}")

    def _close(self) -> None:
        if self._base:
            with current_device(self._device):
                call("cuIpcCloseMemHandle", self._base)


def _exported(allocation_address: int, device: int) -> bytes:
    opens = IpcMemHandle()
    with current_device(device):
        call("cuIpcGetMemHandle", ctypes.byref(opens), allocation_address)
    return bytes(opens)


def _to_device(to: int, source: int, length_bytes: int, stream: int) -> None:
    call("cuMemcpyDtoDAsync_v2", to, source, length_bytes, stream)


def _to_host(to: int, source: int, length_bytes: int, stream: int) -> None:
    call("cuMemcpyDtoHAsync_v2", to, source, length_bytes, stream)


def _cannot(region: GpuMemory, why: str) -> ConfigError:
    return ConfigError(
        f"{region.length_bytes} bytes of a GPU's memory cannot be offered to others: {why}; the pool must be one "
        "cuMemAlloc, or take cuda_ipc out of transfer.transports"
    )
