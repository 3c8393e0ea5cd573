"""This engine's readers, one for each transport, and how each fills a landing."""

from collections.abc import Callable

import numpy as np

from loraserve.bus.protocol import Bus
from loraserve.engine.landing import Landing
from loraserve.engine.pool_memory import Bytes, LendableDevice, PoolMemory
from loraserve.errors import ConfigError
from loraserve.log import get_logger
from loraserve.transfer.cuda_driver import GpuMemory
from loraserve.transfer.cuda_ipc import CudaIpcReader
from loraserve.transfer.protocol import (
    CudaIpcHandle,
    Handle,
    Range,
    Reader,
    TransferError,
    Transport,
    VerbsHandle,
    asked,
    check_ranges,
)
from loraserve.transfer.shm import SLICED_BYTES, ShmReader
from loraserve.transfer.tcp import TcpReader
from loraserve.transfer.verbs import VerbsReader
from loraserve.transfer.verbs_device import Device, Place

SILENCE_S = 5.0
"""A piece that takes longer than this is not waited for any more."""
PIECE_BYTES = 8 << 20
"""Read at a time: on the way to a device's memory so much of this process's is held, and where a slab is read into this
process's a step may begin after the first."""


class Readers:
    """Made when they are first needed, in the event loop. ``device`` is the RDMA device, where there is one."""

    def __init__(self, bus: Bus, pool: PoolMemory, device: Device | None) -> None:
        self._bus = bus
        self._readers: dict[Transport, Reader] = {}
        self._makers: dict[Transport, Callable[[], Reader]] = {
            "shm": ShmReader,
            "tcp": lambda: TcpReader(bus, SILENCE_S),
        }
        self._gpu = pool.memory if isinstance(pool, LendableDevice) else None
        self._ipc: CudaIpcReader | None = None
        self._verbs: tuple[VerbsReader, Place] | None = None
        if device is not None:
            try:
                self._open_verbs(bus, pool, device)
            except ConfigError as error:
                # The host cache may be offered over a device that cannot reach the pool.
                get_logger(__name__).warning("pool_not_read_to", transport="verbs", reason=str(error))

    async def read(self, handle: Handle, start: int, landing: Landing) -> None:
        """Fills the landing from ``start`` of the handle's region on. Raises TransferError."""
        into = landing.view()
        gpu = self._gpu if into is None else None
        if gpu is not None and await self._to_gpu(handle, [Range(start, landing.slab_bytes)], gpu, landing):
            landing.arrived(landing.slab_bytes)
            return
        reader = self._reader(handle)
        if into is not None and _whole(handle, landing.slab_bytes):
            await reader.read(handle, [Range(start, landing.slab_bytes)], into)
            landing.arrived(landing.slab_bytes)
            return

        # Of all before any: a step could begin with the pieces before one that cannot be.
        check_ranges(handle, [Range(start, landing.slab_bytes)])

        async def fetch(at: int, length: int) -> Bytes | None:
            piece = np.empty(length, np.uint8).data if into is None else into[at : at + length]
            await reader.read(handle, [Range(start + at, length)], piece)
            return piece if into is None else None

        await landing.stream(PIECE_BYTES, fetch)

    def forget(self, owner: str, incarnation: str) -> None:
        """It is gone, and what was connected to it with it. Other readers notice by themselves."""
        verbs = self._readers.get("verbs")
        if isinstance(verbs, VerbsReader):
            verbs.forget(owner, incarnation)

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()
        if self._ipc is not None:
            self._ipc.close()

    def _open_verbs(self, bus: Bus, pool: PoolMemory, device: Device) -> None:
        verbs = self._readers["verbs"] = VerbsReader(bus, device, SILENCE_S)
        whole = pool.view(0, len(pool)) if self._gpu is None else self._gpu
        if whole is not None:
            self._verbs = verbs, verbs.keep(whole)

    async def _to_gpu(self, handle: Handle, ranges: list[Range], gpu: GpuMemory, landing: Landing) -> bool:
        """Whether this transport writes there by itself, and has."""
        match handle:
            case CudaIpcHandle():
                await self._ipc_reader(handle, gpu).read_into(handle, ranges, gpu, landing.offset_bytes)
                return True
            case VerbsHandle() if self._verbs is not None:
                reader, place = self._verbs
                await reader.read_into(handle, ranges, place, landing.offset_bytes)
                return True
        return False

    def _ipc_reader(self, handle: Handle, gpu: GpuMemory) -> CudaIpcReader:
        if self._ipc is None:
            try:
                self._ipc = CudaIpcReader(gpu.device)
            except ConfigError as error:
                raise TransferError("refused", f"{asked(handle, 'a read')}: {error}") from error
        return self._ipc

    def _reader(self, handle: Handle) -> Reader:
        transport = handle.transport
        if transport not in self._readers:
            if transport not in self._makers:
                raise TransferError("refused", f"{asked(handle, 'a read')}: not offered here; use another transport")
            self._readers[transport] = self._makers[transport]()
        return self._readers[transport]


def _whole(handle: Handle, slab_bytes: int) -> bool:
    """Read at once. Beyond SLICED_BYTES shm copies in a thread, for which pieces are too short: in the event loop a
    slab of 256 MiB took 1.35 times as long and held it up for 2 to 4 ms at a time (AMD EPYC, 2 cores)."""
    return slab_bytes <= PIECE_BYTES or (handle.transport == "shm" and slab_bytes > SLICED_BYTES)
