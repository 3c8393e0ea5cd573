"""A peer engine as the source of a slab: a lease on the slab's extent, a one-sided read, and the release of the lease.

`TransportReaders` has one reader for each transport, and says in which pieces each fills the extent.
"""

import asyncio
import secrets
import time
from collections.abc import Callable

import numpy as np

from loraserve.adapter.format import SlabHeader
from loraserve.bus.protocol import Bus
from loraserve.engine.loading.memory import Bytes, LendableDevice, PoolMemory, TransferTarget
from loraserve.engine.loading.source import DamagedSlabError, SlabReadError, check_header
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
from loraserve.messages.transfer import (
    TRANSFER_PROTOCOL_VERSION,
    Abilities,
    CudaIpcHandle,
    Handle,
    Transport,
    VerbsHandle,
)
from loraserve.transfer.cuda_driver import GpuMemory
from loraserve.transfer.cuda_ipc import CudaIpcReader
from loraserve.transfer.protocol import ByteRange, RegionReader, TransferError, check_ranges, describe
from loraserve.transfer.shm import SLICED_BYTES, ShmReader
from loraserve.transfer.tcp import TcpReader
from loraserve.transfer.verbs.device import RdmaDevice, RegisteredMemory
from loraserve.transfer.verbs.reader import VerbsReader

ANSWER_S = 2.0
"""A living owner answers a lease request in milliseconds."""
RENEW_AT = 0.5
"""A lease is renewed after this share of its time."""
SOONEST_S = 0.01
SILENCE_S = 5.0
"""A piece that takes longer than this has failed."""
PIECE_BYTES = 8 << 20
"""A read is split into pieces of this size. A read to a device holds so much of this process's memory, and after a
piece of a read to this process's memory a step may begin."""


class TransportReaders:
    """The readers of this engine, made when they are first needed, in the event loop.

    ``device`` is the RDMA device, if there is one. ``abilities`` are what this engine can read over; None for an engine
    that does not read from peers.
    """

    def __init__(
        self, bus: Bus, pool: PoolMemory, device: RdmaDevice | None, abilities: Abilities | None = None
    ) -> None:
        self.abilities = abilities
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

    async def read(self, handle: Handle, start: int, target: TransferTarget) -> None:
        """Fill the target from the byte ``start`` of the handle's region on. Raises TransferError."""
        slab = ByteRange(start, target.slab_bytes)
        into = target.view()
        gpu = self._gpu if into is None else None
        if gpu is not None and await self._read_to_gpu(handle, slab, gpu, target):
            target.advance(target.slab_bytes)
            return
        reader = self._reader(handle)
        if into is not None and _is_read_at_once(handle, target.slab_bytes):
            await reader.read(handle, [slab], into)
            target.advance(target.slab_bytes)
            return

        # The whole range is checked before the first piece: a step could begin with pieces before an invalid one.
        check_ranges(handle, [slab])

        async def fetch(at: int, length: int) -> Bytes | None:
            piece = np.empty(length, np.uint8).data if into is None else into[at : at + length]
            await reader.read(handle, [ByteRange(start + at, length)], piece)
            return piece if into is None else None

        await target.stream(PIECE_BYTES, fetch)

    def forget(self, owner: str, incarnation: str) -> None:
        """Drop the connections to a peer that has died; readers of other transports notice by themselves."""
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
        memory = pool.view(0, len(pool)) if self._gpu is None else self._gpu
        if memory is not None:
            self._verbs = verbs, verbs.keep(memory)

    async def _read_to_gpu(self, handle: Handle, slab: ByteRange, gpu: GpuMemory, target: TransferTarget) -> bool:
        """Read straight into the GPU's memory. Return False if this transport cannot."""
        match handle:
            case CudaIpcHandle():
                await self._ipc_reader(handle, gpu).read_into(handle, [slab], gpu, target.offset_bytes)
                return True
            case VerbsHandle() if self._verbs is not None:
                reader, memory = self._verbs
                await reader.read_into(handle, [slab], memory, target.offset_bytes)
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


def _is_read_at_once(handle: Handle, slab_bytes: int) -> bool:
    """Return whether a slab is read in one piece.

    Beyond SLICED_BYTES shm copies in a thread, for which pieces are too short: in the event loop a slab of 256 MiB took
    1.35 times as long and held up the loop for 2 to 4 ms at a time (AMD EPYC, 2 cores).
    """
    return slab_bytes <= PIECE_BYTES or (handle.transport == "shm" and slab_bytes > SLICED_BYTES)


class PeerSource:
    """A peer as a source, over one transport; see SlabSource."""

    def __init__(self, bus: Bus, source: ReadSource, readers: TransportReaders) -> None:
        self.source = source
        self._bus = bus
        self._readers = readers
        self._granted: LeaseGranted | None = None
        self._lasts_until_s = 0.0

    async def open(self, adapter: AdapterRef) -> SlabHeader:
        """Get a lease on the peer's slab; return its header. Raises SlabReadError."""
        peer = self.source.name
        request = LeaseSlab(
            protocol=TRANSFER_PROTOCOL_VERSION,
            incarnation=self._bus.incarnation,
            read_id=secrets.token_hex(8),
            version=adapter.version,
            slab_bytes=adapter.slab_bytes,
        )
        asked_s = time.monotonic()
        try:
            granted, frames = await self._bus.request_frames(peer, request, LeaseGranted, ANSWER_S)
        except RequestTimeoutError as error:
            raise SlabReadError("timeout", f"{peer} did not answer: {error}") from error
        except PeerError as error:
            raise SlabReadError(error.code, error.message) from error
        self._granted = granted
        self._lasts_until_s = asked_s + granted.lasts_s
        return check_header(adapter, frames[0] if frames else None, granted.slab_bytes, peer)

    async def copy(self, adapter: AdapterRef, target: TransferTarget) -> None:
        granted = self._granted
        assert granted is not None, "a source is opened first"
        handle = self._select_handle(granted)
        try:
            async with asyncio.TaskGroup() as tasks:
                renewing = tasks.create_task(self._renew(granted))
                await self._readers.read(handle, granted.offset_bytes, target)
                renewing.cancel()
        except ExceptionGroup as group:
            error = group.exceptions[0]
            if isinstance(error, TransferError):
                # A peer that is gone is gone over every transport.
                other_transport = error.code in ("refused", "size")
                raise SlabReadError(error.code, error.message, other_transport=other_transport) from error
            raise error from None

    def close(self, damaged: DamagedSlabError | None) -> None:
        """Release the lease, and complain first if the slab was damaged."""
        granted = self._granted
        if granted is None:
            return
        if damaged is not None:
            # Before the release: the owner listens only to readers with a lease.
            complaint = SlabDamaged(version=granted.version, lease_id=granted.lease_id, layer=damaged.layer)
            self._bus.send(self.source.name, complaint)
        release = ReleaseLease(lease_id=granted.lease_id, incarnation=self._bus.incarnation)
        # Sent without waiting for an answer: if it is lost the lease ends by its deadline.
        self._bus.send(self.source.name, release)

    def _select_handle(self, granted: LeaseGranted) -> Handle:
        # The handle names its owner, which is checked: only memory of the peer that granted the lease is read.
        for handle in granted.handles:
            if handle.transport == self.source.transport and handle.owner == self.source.name:
                return handle
        message = f"{self.source.name} does not offer {self.source.transport} any more"
        raise SlabReadError("refused", message, other_transport=True)

    async def _renew(self, granted: LeaseGranted) -> None:
        peer = self.source.name
        renewal = RenewLease(lease_id=granted.lease_id, incarnation=self._bus.incarnation)
        while True:
            await asyncio.sleep(max(SOONEST_S, RENEW_AT * (self._lasts_until_s - time.monotonic())))
            asked_s = time.monotonic()
            try:
                renewed = await self._bus.request(peer, renewal, LeaseRenewed, ANSWER_S)
            except RequestTimeoutError as error:
                if time.monotonic() < self._lasts_until_s:
                    # The owner's processor may be busy, and its memory is read without it.
                    continue
                raise SlabReadError("lease_ended", f"{peer} did not renew the lease: {error}") from error
            except PeerError as error:
                raise SlabReadError("lease_ended", f"{peer} did not renew the lease: {error}") from error
            if asked_s + renewed.lasts_s <= self._lasts_until_s:
                # The lease lasts as long as any may, and what is read until its end still counts.
                return
            self._lasts_until_s = asked_s + renewed.lasts_s
