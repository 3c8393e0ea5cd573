"""This engine's readers, one for each transport, and how each fills a landing."""

import asyncio
import secrets
import time
from collections.abc import Callable

import numpy as np

from loraserve.adapter.format import SlabHeader
from loraserve.bus.protocol import Bus
from loraserve.engine.loading.memory import Bytes, Landing, LendableDevice, PoolMemory
from loraserve.engine.loading.source import Damaged, LoadFailed, checked_header
from loraserve.engine.loading.speeds import ReadSource
from loraserve.errors import ConfigError, PeerError, RequestTimeoutError
from loraserve.log import get_logger
from loraserve.messages import (
    AdapterRef,
    LeaseGranted,
    LeaseRenewed,
    LeaseSlab,
    ReleaseLease,
    RenewLease,
    SlabDamaged,
)
from loraserve.messages.transfer import TRANSFER_PROTOCOL_VERSION, CudaIpcHandle, Handle, Transport, VerbsHandle
from loraserve.transfer.cuda_driver import GpuMemory
from loraserve.transfer.cuda_ipc import CudaIpcReader
from loraserve.transfer.protocol import ByteRange, RegionReader, TransferError, check_ranges, describe
from loraserve.transfer.shm import SLICED_BYTES, ShmReader
from loraserve.transfer.tcp import TcpReader
from loraserve.transfer.verbs.device import RdmaDevice, RegisteredMemory
from loraserve.transfer.verbs.reader import VerbsReader

SILENCE_S = 5.0
"""A piece that takes longer than this is not waited for any more."""
PIECE_BYTES = 8 << 20
"""Read at a time: on the way to a device's memory so much of this process's is held, and where a slab is read into this
process's a step may begin after the first."""


class Readers:
    """Made when they are first needed, in the event loop. ``device`` is the RDMA device, where there is one."""

    def __init__(self, bus: Bus, pool: PoolMemory, device: RdmaDevice | None) -> None:
        self._bus = bus
        self._readers: dict[Transport, RegionReader] = {}
        self._makers: dict[Transport, Callable[[], RegionReader]] = {
            "shm": ShmReader,
            "tcp": lambda: TcpReader(bus, SILENCE_S),
        }
        self._gpu = pool.memory if isinstance(pool, LendableDevice) else None
        self._ipc: CudaIpcReader | None = None
        self._verbs: tuple[VerbsReader, RegisteredMemory] | None = None
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
        if gpu is not None and await self._to_gpu(handle, [ByteRange(start, landing.slab_bytes)], gpu, landing):
            landing.arrived(landing.slab_bytes)
            return
        reader = self._reader(handle)
        if into is not None and _whole(handle, landing.slab_bytes):
            await reader.read(handle, [ByteRange(start, landing.slab_bytes)], into)
            landing.arrived(landing.slab_bytes)
            return

        # Of all before any: a step could begin with the pieces before one that cannot be.
        check_ranges(handle, [ByteRange(start, landing.slab_bytes)])

        async def fetch(at: int, length: int) -> Bytes | None:
            piece = np.empty(length, np.uint8).data if into is None else into[at : at + length]
            await reader.read(handle, [ByteRange(start + at, length)], piece)
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

    def _open_verbs(self, bus: Bus, pool: PoolMemory, device: RdmaDevice) -> None:
        verbs = self._readers["verbs"] = VerbsReader(bus, device, SILENCE_S)
        whole = pool.view(0, len(pool)) if self._gpu is None else self._gpu
        if whole is not None:
            self._verbs = verbs, verbs.keep(whole)

    async def _to_gpu(self, handle: Handle, ranges: list[ByteRange], gpu: GpuMemory, landing: Landing) -> bool:
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
                raise TransferError("refused", f"{describe(handle, 'a read')}: {error}") from error
        return self._ipc

    def _reader(self, handle: Handle) -> RegionReader:
        transport = handle.transport
        if transport not in self._readers:
            if transport not in self._makers:
                raise TransferError("refused", f"{describe(handle, 'a read')}: not offered here; use another transport")
            self._readers[transport] = self._makers[transport]()
        return self._readers[transport]


def _whole(handle: Handle, slab_bytes: int) -> bool:
    """Read at once. Beyond SLICED_BYTES shm copies in a thread, for which pieces are too short: in the event loop a
    slab of 256 MiB took 1.35 times as long and held it up for 2 to 4 ms at a time (AMD EPYC, 2 cores)."""
    return slab_bytes <= PIECE_BYTES or (handle.transport == "shm" and slab_bytes > SLICED_BYTES)


ANSWER_S = 2.0
"""An owner that is alive answers in milliseconds."""
RENEW_AT = 0.5
"""Of what a lease lasts."""
SOONEST_S = 0.01


class PeerSource:
    """See Source."""

    def __init__(self, bus: Bus, way: ReadSource, readers: Readers) -> None:
        self.way = way
        self._bus = bus
        self._readers = readers
        self._granted: LeaseGranted | None = None
        self._lasts_until_s = 0.0

    async def open(self, adapter: AdapterRef) -> SlabHeader:
        describe = LeaseSlab(
            protocol=TRANSFER_PROTOCOL_VERSION,
            incarnation=self._bus.incarnation,
            read_id=secrets.token_hex(8),
            version=adapter.version,
            slab_bytes=adapter.slab_bytes,
        )
        asked_s = time.monotonic()
        try:
            granted, frames = await self._bus.request_frames(self.way.name, describe, LeaseGranted, ANSWER_S)
        except RequestTimeoutError as error:
            raise LoadFailed("timeout", f"{self.way.name} did not answer: {error}") from error
        except PeerError as error:
            raise LoadFailed(error.code, error.message) from error
        self._granted = granted
        self._lasts_until_s = asked_s + granted.lasts_s
        return checked_header(adapter, frames[0] if frames else None, granted.slab_bytes, self.way.name)

    async def copy(self, adapter: AdapterRef, landing: Landing) -> None:
        granted = self._granted
        assert granted is not None, "a source is opened first"
        handle = self._handle(granted)
        try:
            async with asyncio.TaskGroup() as tasks:
                renewing = tasks.create_task(self._renew(granted))
                await self._readers.read(handle, granted.offset_bytes, landing)
                renewing.cancel()
        except ExceptionGroup as failed:
            error = failed.exceptions[0]
            if isinstance(error, TransferError):
                # Whoever is gone is gone over every transport.
                raise LoadFailed(error.code, error.message, of_way=error.code in ("refused", "size")) from error
            raise error from None

    def close(self, damaged: Damaged | None) -> None:
        granted = self._granted
        if granted is None:
            return
        if damaged is not None:
            # Before the release: only of who has the lease it is heard.
            complaint = SlabDamaged(version=granted.version, lease_id=granted.lease_id, layer=damaged.layer)
            self._bus.send(self.way.name, complaint)
        release = ReleaseLease(lease_id=granted.lease_id, incarnation=self._bus.incarnation)
        # One-way: where it is lost the lease ends by its deadline.
        self._bus.send(self.way.name, release)

    def _handle(self, granted: LeaseGranted) -> Handle:
        """Its owner's word for who owns the memory is not enough: what is read is asked of the one that leased it."""
        for handle in granted.handles:
            if handle.transport == self.way.transport and handle.owner == self.way.name:
                return handle
        raise LoadFailed("refused", f"{self.way.name} does not offer {self.way.transport} any more", of_way=True)

    async def _renew(self, granted: LeaseGranted) -> None:
        """For as long as it reads."""
        renewal = RenewLease(lease_id=granted.lease_id, incarnation=self._bus.incarnation)
        while True:
            await asyncio.sleep(max(SOONEST_S, RENEW_AT * (self._lasts_until_s - time.monotonic())))
            asked_s = time.monotonic()
            try:
                renewed = await self._bus.request(self.way.name, renewal, LeaseRenewed, ANSWER_S)
            except RequestTimeoutError as error:
                if time.monotonic() < self._lasts_until_s:
                    # Its processor may be busy, and its memory is read without it.
                    continue
                raise LoadFailed("lease_ended", f"{self.way.name} did not renew the lease: {error}") from error
            except PeerError as error:
                raise LoadFailed("lease_ended", f"{self.way.name} did not renew the lease: {error}") from error
            if asked_s + renewed.lasts_s <= self._lasts_until_s:
                # It has lasted as long as any may: what is read until its end still counts.
                return
            self._lasts_until_s = asked_s + renewed.lasts_s
