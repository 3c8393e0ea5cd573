"""RDMA devices: listing them, opening one, and registering memory with it.

Only this module and queue.py use pyverbs. They import it only if a port is up, because most machines do not have it.
Registering memory holds the interpreter's lock for 0.1 ms per MiB or more (15 ms under emulation), so pools are
registered when a process starts.
"""

import ctypes
import importlib
import importlib.util
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from loraserve.errors import ConfigError
from loraserve.transfer.cuda_driver import CudaCallError, GpuMemory, call, current_device, device_attribute
from loraserve.transfer.verbs.plan import best_gid

DEVICES = Path("/sys/class/infiniband")
ACTIVE = "4:"
ETHERNET = "Ethernet"
UNUSED_GIDS = 8
"""The search for GIDs ends after this many unused entries. Tables have up to 1024 and are filled from the front."""


class Port(msgspec.Struct, frozen=True, kw_only=True):
    device: str
    number: int
    gid_index: int
    gid: str
    link_layer: str


def usable_ports(devices: Path = DEVICES) -> list[Port]:
    """Return the ports that are up and have a GID, sorted by device name and port number."""
    paths = sorted(devices.glob("*/ports/*"), key=lambda path: (path.parts[-3], int(path.name)))
    found = (_port(path) for path in paths)
    return [port for port in found if port is not None]


def unusable_reason(devices: Path = DEVICES) -> str:
    """Return why verbs cannot be used here; "" if they can. pyverbs is imported only if a port is up."""
    if not devices.is_dir() or not any(devices.iterdir()):
        return "this machine has no RDMA device"
    if not any(map(_is_up, devices.glob("*/ports/*"))):
        return "none of this machine's RDMA ports is up"
    if importlib.util.find_spec("pyverbs") is None:
        return "there is no pyverbs for this Python; install Debian's python3-pyverbs or the extra `rdma`"
    try:
        importlib.import_module("pyverbs.device")
    except ImportError as error:
        return f"pyverbs cannot be imported ({error}); it must be of the same release as libibverbs"
    return ""


def _port(path: Path) -> Port | None:
    if not _is_up(path):
        return None
    try:
        gid = best_gid(_gids(path))
        link_layer = _text(path / "link_layer")
    except OSError:
        # The device was removed during the search.
        return None
    if gid is None:
        return None
    return Port(device=path.parts[-3], number=int(path.name), gid_index=gid[0], gid=gid[1], link_layer=link_layer)


def _is_up(path: Path) -> bool:
    try:
        return _text(path / "state").startswith(ACTIVE)
    except OSError:
        return False


def _gids(path: Path) -> Iterator[tuple[int, str, str]]:
    unused = 0
    for index in range(len(os.listdir(path / "gids"))):
        try:
            # Reading an unused entry fails.
            kind = _text(path / "gid_attrs" / "types" / str(index))
        except OSError:
            unused += 1
            if unused == UNUSED_GIDS:
                return
            continue
        unused = 0
        yield index, _text(path / "gids" / str(index)), kind


def _text(path: Path) -> str:
    return path.read_text().strip()


WRITES_ORDERING = 118
DMA_BUF_SUPPORTED = 124
DMA_BUF_DESCRIPTOR = 1
CURRENT_CONTEXT = 0
TO_OWNER = 100
PEERMEM = Path("/sys/module/nvidia_peermem")


def dma_buf_works(device: int) -> bool:
    """Return whether the GPU can export its memory as a dma-buf."""
    try:
        return bool(device_attribute(device, DMA_BUF_SUPPORTED))
    except (ConfigError, CudaCallError):
        return False


def peermem_works() -> bool:
    """Return whether GPU addresses can be registered like host addresses."""
    return PEERMEM.exists()


@contextmanager
def dma_buf(memory: GpuMemory) -> Iterator[tuple[int, int]]:
    """Yield a dma-buf descriptor and the memory's offset in it. A registration outlives the closed descriptor."""
    start = memory.address // mmap.PAGESIZE * mmap.PAGESIZE
    end = -(-(memory.address + memory.length_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
    descriptor = ctypes.c_int(-1)
    try:
        with current_device(memory.device):
            call("cuMemGetHandleForAddressRange", ctypes.byref(descriptor), start, end - start, DMA_BUF_DESCRIPTOR, 0)
    except CudaCallError as error:
        raise ConfigError(
            f"GPU memory cannot be registered: {error}; allocate the pool with one cuMemAlloc, and use a driver with "
            "open kernel modules"
        ) from error
    try:
        yield descriptor.value, memory.address - start
    finally:
        os.close(descriptor.value)


def flush_remote_writes(device: int) -> None:
    """Make remote writes to the GPU's memory visible to kernels launched afterwards."""
    if device_attribute(device, WRITES_ORDERING) < TO_OWNER:
        with current_device(device):
            call("cuFlushGPUDirectRDMAWrites", CURRENT_CONTEXT, TO_OWNER)


Memory = memoryview | GpuMemory

opening = Lock()
"""Lock for creating event descriptors. A creator finds its own by listing the descriptors before and after."""


@cache
def pyverbs_module(name: str) -> ModuleType:
    return importlib.import_module(f"pyverbs.{name}")


@cache
def verbs_enums() -> ModuleType:
    try:
        return pyverbs_module("libibverbs_enums")
    except ImportError:
        # Older releases of rdma-core (5x).
        return pyverbs_module("enums")


def verbs_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that pyverbs raises, including those for numbers out of range."""
    base: type[Exception] = pyverbs_module("pyverbs_error").PyverbsError
    return base, OverflowError, ValueError, TypeError


class RegisteredMemory:
    """Memory registered with a device as a ``pyverbs.mr.MR``. RDMA requests address its first byte as ``base``."""

    def __init__(self, registered: Any, base: int, length_bytes: int, keeps: object) -> None:
        self._registered = registered
        self._keeps = keeps
        self.base = base
        self.length_bytes = length_bytes
        self.local_key: int = registered.lkey
        self.remote_key: int = registered.rkey

    def holds(self, address: int, length_bytes: int) -> bool:
        """Return whether this is host memory that contains the given range."""
        inside = self.base <= address and address + length_bytes <= self.base + self.length_bytes
        return inside and not isinstance(self._keeps, GpuMemory)

    def settle(self) -> None:
        """Make a finished read into this memory visible to the GPU. Call this before using the memory."""
        if isinstance(self._keeps, GpuMemory):
            flush_remote_writes(self._keeps.device)

    def close(self) -> None:
        """Deregister the memory, which invalidates its keys."""
        self._registered.close()
        self._keeps = None


class RdmaDevice:
    """An open RDMA device. If ``name`` is "", this is the first device with a port that is up. Raises ConfigError."""

    def __init__(self, name: str = "") -> None:
        self.port = _chosen(name)
        try:
            with opening:
                self.context = pyverbs_module("device").Context(name=self.port.device)
            self.domain = pyverbs_module("pd").PD(self.context)
            port, device = self.context.query_port(self.port.number), self.context.query_device()
        except verbs_errors() as error:
            raise ConfigError(
                f"RDMA device {self.port.device} cannot be opened: {error}; "
                "the process needs /dev/infiniband, or take verbs out of transfer.transports"
            ) from error
        self.lid: int = port.lid
        self.mtu: int = port.active_mtu
        self.longest_message_bytes: int = port.max_msg_sz
        self.reads_served: int = device.max_qp_rd_atom
        self.reads_asked: int = device.max_qp_init_rd_atom
        self.longest_queue: int = min(device.max_qp_wr, device.max_cqe)

    def readable(self, memory: Memory) -> RegisteredMemory:
        """Register memory that peers may read."""
        return self._register(memory, verbs_enums().IBV_ACCESS_REMOTE_READ)

    def writable(self, memory: Memory) -> RegisteredMemory:
        """Register memory as a destination of this process's own reads; peers cannot access it."""
        return self._register(memory, verbs_enums().IBV_ACCESS_LOCAL_WRITE)

    def close(self) -> None:
        """Close the device and everything created on it."""
        self.context.close()

    def _register(self, memory: Memory, access: int) -> RegisteredMemory:
        if isinstance(memory, GpuMemory):
            return self._register_gpu(memory, access)
        data = as_array(memory)
        try:
            registered = pyverbs_module("mr").MR(self.domain, data.nbytes, access, address=data.ctypes.data)
        except verbs_errors() as error:
            raise self._cannot(f"{data.nbytes} bytes", error) from error
        return RegisteredMemory(registered, data.ctypes.data, data.nbytes, data)

    def _register_gpu(self, memory: GpuMemory, access: int) -> RegisteredMemory:
        what = f"{memory.length_bytes} bytes of GPU memory"
        try:
            if dma_buf_works(memory.device):
                with dma_buf(memory) as (descriptor, offset):
                    make = pyverbs_module("mr").DmaBufMR
                    registered = make(self.domain, memory.length_bytes, access, descriptor, offset)
                # For a DmaBufMR of pyverbs, the address of the first byte is its offset in the dma-buf.
                return RegisteredMemory(registered, offset, memory.length_bytes, memory)
            if peermem_works():
                registered = pyverbs_module("mr").MR(self.domain, memory.length_bytes, access, address=memory.address)
                return RegisteredMemory(registered, memory.address, memory.length_bytes, memory)
        except verbs_errors() as error:
            raise self._cannot(what, error) from error
        raise ConfigError(
            f"{what} cannot be registered with {self.port.device}: its driver offers no dma-buf and the module "
            "nvidia-peermem is not loaded; load it or take verbs out of transfer.transports"
        )

    def _cannot(self, what: str, error: Exception) -> ConfigError:
        return ConfigError(
            f"{what} cannot be registered with {self.port.device}: {error}; raise the limit of locked memory "
            "(ulimit -l unlimited) or take verbs out of transfer.transports"
        )


def as_array(memory: memoryview) -> npt.NDArray[np.uint8]:
    return np.frombuffer(memory, np.uint8)


def _chosen(name: str) -> Port:
    reason = unusable_reason()
    if reason:
        raise ConfigError(f"verbs cannot be used: {reason}; or take verbs out of transfer.transports")
    ports = [port for port in usable_ports() if name in ("", port.device)]
    if not ports:
        raise ConfigError(f"verbs cannot be used: no port of RDMA device {name!r} is up")
    return ports[0]
