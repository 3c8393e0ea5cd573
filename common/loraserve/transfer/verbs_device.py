"""An RDMA device, opened, and memory that it may reach. Here and in verbs_queue alone is pyverbs spoken.

pyverbs is imported when a device is opened: most machines have neither. Registering holds the interpreter's lock for
0.1 ms a MiB and more (15 ms under emulation), so pools are registered at the start.
"""

import importlib
from functools import cache
from threading import Lock
from types import ModuleType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from loraserve.errors import ConfigError
from loraserve.transfer.cuda_driver import GpuMemory
from loraserve.transfer.verbs_cuda import dma_buf, dma_buf_works, flush_remote_writes, peermem_works
from loraserve.transfer.verbs_ports import Port, usable_ports, why_not

Memory = memoryview | GpuMemory

opening = Lock()
"""Held while descriptors are made: which are whose is seen from which are new."""


class Registered(Protocol):
    """pyverbs' MR, as far as it is used."""

    lkey: int
    rkey: int

    def close(self) -> None: ...


@cache
def module(name: str) -> ModuleType:
    return importlib.import_module(f"pyverbs.{name}")


@cache
def enums() -> ModuleType:
    try:
        return module("libibverbs_enums")
    except ImportError:
        # Up to release 5x of rdma-core.
        return module("enums")


def errors() -> tuple[type[Exception], ...]:
    """What pyverbs raises, also for numbers that do not fit."""
    base: type[Exception] = module("pyverbs_error").PyverbsError
    return base, OverflowError, ValueError, TypeError


class Place:
    """Registered memory. ``base`` is the address by which both sides name its first byte."""

    def __init__(self, registered: Registered, base: int, length_bytes: int, keeps: object) -> None:
        self._registered = registered
        self._keeps = keeps
        self.base = base
        self.length_bytes = length_bytes
        self.local_key = registered.lkey
        self.remote_key = registered.rkey

    def holds(self, address: int, length_bytes: int) -> bool:
        """Whether these bytes of the host's memory are within it."""
        inside = self.base <= address and address + length_bytes <= self.base + self.length_bytes
        return inside and not isinstance(self._keeps, GpuMemory)

    def settle(self) -> None:
        """After a read into it, before it is used."""
        if isinstance(self._keeps, GpuMemory):
            flush_remote_writes(self._keeps.device)

    def close(self) -> None:
        """Its keys are void from here on."""
        self._registered.close()
        self._keeps = None


class Device:
    """Raises ConfigError, as its ``register`` does. ``name`` "" is the first that has a port which is up."""

    def __init__(self, name: str = "") -> None:
        self.port = _chosen(name)
        try:
            with opening:
                self.context = module("device").Context(name=self.port.device)
            self.domain = module("pd").PD(self.context)
            port, device = self.context.query_port(self.port.number), self.context.query_device()
        except errors() as error:
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

    def readable(self, memory: Memory) -> Place:
        """Peers may read it, nobody may write to it."""
        return self._register(memory, enums().IBV_ACCESS_REMOTE_READ)

    def writable(self, memory: Memory) -> Place:
        """What this process reads may go there; for peers it is not there."""
        return self._register(memory, enums().IBV_ACCESS_LOCAL_WRITE)

    def close(self) -> None:
        """With everything that was made on it."""
        self.context.close()

    def _register(self, memory: Memory, access: int) -> Place:
        if isinstance(memory, GpuMemory):
            return self._register_gpu(memory, access)
        data = as_array(memory)
        try:
            registered = module("mr").MR(self.domain, data.nbytes, access, address=data.ctypes.data)
        except errors() as error:
            raise self._cannot(f"{data.nbytes} bytes", error) from error
        return Place(registered, data.ctypes.data, data.nbytes, data)

    def _register_gpu(self, memory: GpuMemory, access: int) -> Place:
        what = f"{memory.length_bytes} bytes of a GPU's memory"
        try:
            if dma_buf_works(memory.device):
                with dma_buf(memory) as (descriptor, offset):
                    make = module("mr").DmaBufMR
                    registered = make(self.domain, memory.length_bytes, access, descriptor, offset)
                # pyverbs takes the offset for the address by which peers name the first byte.
                return Place(registered, offset, memory.length_bytes, memory)
            if peermem_works():
                registered = module("mr").MR(self.domain, memory.length_bytes, access, address=memory.address)
                return Place(registered, memory.address, memory.length_bytes, memory)
        except errors() as error:
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
    reason = why_not()
    if reason:
        raise ConfigError(f"verbs cannot be used: {reason}; or take verbs out of transfer.transports")
    ports = [port for port in usable_ports() if name in ("", port.device)]
    if not ports:
        raise ConfigError(f"verbs cannot be used: no port of RDMA device {name!r} is up")
    return ports[0]
