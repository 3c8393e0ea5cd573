"""The sources of slabs: the store, and peers over each transport. The host cache has its own module.

`SourceFinder` returns the sources of one adapter in the order in which to try them. `StoreSource` reads over the bus.
`PeerSource` leases the slab's extent in the peer's memory, reads the slab and releases the lease. It reads with
`PeerTransports`, which has one reader for each transport and splits reads into pieces.
"""

import asyncio
import secrets
from collections.abc import Callable
from typing import Protocol, TypeVar

import msgspec
import numpy as np

from loraserve.adapter.format import SlabHeader, decode_header, slab_version
from loraserve.bus.protocol import Bus, Frame
from loraserve.clock import Clock
from loraserve.config import Config
from loraserve.engine.loading.memory import Bytes, LendableDevice, PoolMemory, TransferTarget
from loraserve.engine.loading.speeds import FROM_STORE, STORE, LinkSpeeds, ReadSource, order_sources
from loraserve.errors import ConfigError, PeerError, RequestTimeoutError
from loraserve.log import get_logger
from loraserve.messages import (
    AdapterRef,
    Copies,
    FindCopies,
    Holder,
    LeaseGranted,
    LeaseRenewed,
    LeaseSlab,
    OpenSlab,
    ReadSlab,
    ReleaseLease,
    RenewLease,
    SlabChunk,
    SlabDamaged,
    SlabInfo,
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

T = TypeVar("T")


class SlabReadError(Exception):
    """A slab could not be read.

    ``code`` is ``not_found``, ``timeout``, ``corrupt``, ``mismatch``, ``internal`` or the source's code.

    ``is_temporary`` means that the read may soon succeed from the same source. ``other_transport`` means that it may
    succeed over another transport of the same peer.
    """

    def __init__(self, code: str, message: str, is_temporary: bool = False, other_transport: bool = False) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.is_temporary = is_temporary
        self.other_transport = other_transport


class DamagedSlabError(SlabReadError):
    """The bytes of ``layer`` do not match its digest in the header."""

    def __init__(self, layer: int) -> None:
        super().__init__("corrupt", f"layer {layer} does not match its digest; register the adapter again")
        self.layer = layer


class SlabSource(Protocol):
    """One attempt to read one slab: call ``open``, then ``copy``. Always call ``close``, also after an error."""

    source: ReadSource

    async def open(self, adapter: AdapterRef) -> SlabHeader:
        """Return the header of the adapter's slab, verified against its version. Raises SlabReadError."""
        ...

    async def copy(self, adapter: AdapterRef, target: TransferTarget) -> None:
        """Fill the target in order. Raises SlabReadError, after which nothing writes to the target any more."""
        ...

    def close(self, damaged: DamagedSlabError | None) -> None:
        """Release the source. ``damaged`` is the error if the slab that was read has a damaged layer, else None."""
        ...


class SlabCache(Protocol):
    """The host cache: a source of slabs, and the place where evicted slabs are saved."""

    async def find(self, adapter: AdapterRef) -> SlabSource | None:
        """Return a source for the adapter; None if it is not cached."""
        ...

    async def wait_saved(self, offset_bytes: int, length_bytes: int) -> None:
        """Wait until no evicted slab is being copied from this range of the pool any more."""
        ...


def check_header(adapter: AdapterRef, frame: Frame | None, claimed_bytes: int, owner: str) -> SlabHeader:
    """Decode the header ``frame`` from ``owner``. Raises SlabReadError unless version and sizes match ``adapter``."""
    try:
        header = decode_header(bytes(frame or b""))
    except msgspec.DecodeError as error:
        raise SlabReadError("corrupt", f"the slab's header cannot be read: {error}") from error
    if not claimed_bytes == header.slab_bytes == adapter.slab_bytes:
        raise SlabReadError(
            "mismatch",
            f"slab_bytes is {adapter.slab_bytes} in the request, {claimed_bytes} in {owner} and "
            f"{header.slab_bytes} in the header; register the adapter again",
        )
    if slab_version(header) != adapter.version:
        raise SlabReadError("corrupt", "the slab's header is of another version; register the adapter again")
    return header


class StoreSource:
    """Reads a slab in chunks from the store over the bus. Errors are temporary while the store restarts.

    A chunk that is not answered within ``timeout_s`` ends the read. The loader then reads again,
    so a lost message costs ``timeout_s`` and not the load's whole deadline.
    """

    source = FROM_STORE

    def __init__(self, bus: Bus, chunk_bytes: int, timeout_s: float) -> None:
        self._bus = bus
        self._chunk_bytes = chunk_bytes
        self._timeout_s = timeout_s

    async def open(self, adapter: AdapterRef) -> SlabHeader:
        info, frames = await self._ask(OpenSlab(version=adapter.version), SlabInfo)
        return check_header(adapter, frames[0] if frames else None, info.slab_bytes, "the store")

    async def copy(self, adapter: AdapterRef, target: TransferTarget) -> None:

        async def fetch(start: int, length: int) -> Bytes:
            request = ReadSlab(version=adapter.version, offset_bytes=start, length_bytes=length)
            _, frames = await self._ask(request, SlabChunk)
            if [len(frame) for frame in frames] != [length]:
                raise SlabReadError("corrupt", f"asked for {length} bytes at {start}, the answer has another size")
            return frames[0]

        await target.stream(self._chunk_bytes, fetch)

    def close(self, damaged: DamagedSlabError | None) -> None:
        """Do nothing: the store keeps no state for a read."""

    async def _ask(self, message: OpenSlab | ReadSlab, reply: type[T]) -> tuple[T, tuple[bytes | memoryview, ...]]:
        try:
            return await self._bus.request_frames(STORE, message, reply, self._timeout_s)
        except RequestTimeoutError as error:
            raise SlabReadError("timeout", f"the store did not answer: {error}", is_temporary=True) from error
        except PeerError as error:
            raise SlabReadError(error.code, error.message, is_temporary=error.code == "starting") from error


ANSWER_S = 2.0
"""Timeout of lease requests. A running peer answers in milliseconds."""
RENEW_AT = 0.5
"""A lease is renewed after this fraction of its remaining time."""
SOONEST_S = 0.01
SILENCE_S = 5.0
"""Seconds without data after which a read fails."""
PIECE_BYTES = 8 << 20
"""Reads are split into pieces of this size. If the target is a device, pieces are buffered in host memory. If
it is host memory, a step may start after any piece."""


class PeerTransports:
    """The transports over which this engine reads from peers. Each transport has one reader.

    ``abilities`` describes the transports that this engine can read over; None if it does not read from peers.
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
                # The device may still be able to export the host cache.
                get_logger(__name__).warning("pool_not_read_to", transport="verbs", reason=str(error))

    async def copy(self, handle: Handle, start: int, target: TransferTarget) -> None:
        """Fill the target with the bytes that begin at ``start`` in the handle's region. Raises TransferError."""
        slab = ByteRange(start, target.slab_bytes)
        into = target.view()
        gpu = self._gpu if into is None else None
        if gpu is not None and await self._read_to_gpu(handle, slab, gpu, target):
            target.arrived(target.slab_bytes)
            return
        reader = self._reader(handle)
        if into is not None and _is_read_at_once(handle, target.slab_bytes):
            await reader.read(handle, [slab], into)
            target.arrived(target.slab_bytes)
            return

        # Check the whole range first: otherwise a step could start with the pieces before an invalid one.
        check_ranges(handle, [slab])

        async def fetch(at: int, length: int) -> Bytes | None:
            piece = np.empty(length, np.uint8).data if into is None else into[at : at + length]
            await reader.read(handle, [ByteRange(start + at, length)], piece)
            return piece if into is None else None

        await target.stream(PIECE_BYTES, fetch)

    def forget(self, owner: str, incarnation: str) -> None:
        """Drop the verbs connections to a dead peer. Readers of other transports detect the death themselves."""
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
        """Read the slab directly into the GPU's memory. Return False if the handle's transport cannot do this."""
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
    """Return whether to read a slab in one piece: it is small, or shm copies it in a thread.

    Copying 256 MiB piece by piece in the event loop, not in a thread, took 35% longer. Each piece also blocked the
    event loop for 2 to 4 ms (AMD EPYC, 2 cores).
    """
    return slab_bytes <= PIECE_BYTES or (handle.transport == "shm" and slab_bytes > SLICED_BYTES)


class PeerSource:
    """Reads one slab from a peer over one transport. Implements `SlabSource`."""

    def __init__(self, bus: Bus, source: ReadSource, transports: PeerTransports, clock: Clock) -> None:
        self.source = source
        self._bus = bus
        self._clock = clock
        self._transports = transports
        self._granted: LeaseGranted | None = None
        self._lasts_until_s = 0.0

    async def open(self, adapter: AdapterRef) -> SlabHeader:
        """Get a lease on the peer's slab and return its header. Raises SlabReadError."""
        peer = self.source.name
        request = LeaseSlab(
            protocol=TRANSFER_PROTOCOL_VERSION,
            incarnation=self._bus.incarnation,
            read_id=secrets.token_hex(8),
            version=adapter.version,
            slab_bytes=adapter.slab_bytes,
        )
        asked_s = self._clock.monotonic_s()
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
                await self._transports.copy(handle, granted.offset_bytes, target)
                renewing.cancel()
        except ExceptionGroup as group:
            error = group.exceptions[0]
            if isinstance(error, TransferError):
                # If the peer is gone, its other transports fail as well.
                other_transport = error.code in ("refused", "size")
                raise SlabReadError(error.code, error.message, other_transport=other_transport) from error
            raise error from None

    def close(self, damaged: DamagedSlabError | None) -> None:
        """Release the lease. If the slab was damaged, report that to the peer first."""
        granted = self._granted
        if granted is None:
            return
        if damaged is not None:
            # Sent before the release, because the owner ignores readers without a lease.
            complaint = SlabDamaged(version=granted.version, lease_id=granted.lease_id, layer=damaged.layer)
            self._bus.send(self.source.name, complaint)
        release = ReleaseLease(lease_id=granted.lease_id, incarnation=self._bus.incarnation)
        # No answer is awaited: if the message is lost, the lease expires.
        self._bus.send(self.source.name, release)

    def _select_handle(self, granted: LeaseGranted) -> Handle:
        # Use only handles owned by the peer that granted the lease.
        for handle in granted.handles:
            if handle.transport == self.source.transport and handle.owner == self.source.name:
                return handle
        message = f"{self.source.name} does not offer {self.source.transport} any more"
        raise SlabReadError("refused", message, other_transport=True)

    async def _renew(self, granted: LeaseGranted) -> None:
        peer = self.source.name
        renewal = RenewLease(lease_id=granted.lease_id, incarnation=self._bus.incarnation)
        while True:
            await asyncio.sleep(max(SOONEST_S, RENEW_AT * (self._lasts_until_s - self._clock.monotonic_s())))
            asked_s = self._clock.monotonic_s()
            try:
                renewed = await self._bus.request(peer, renewal, LeaseRenewed, ANSWER_S)
            except RequestTimeoutError as error:
                if self._clock.monotonic_s() < self._lasts_until_s:
                    # The owner's CPU may be busy. The read needs no help from it, so it continues.
                    continue
                raise SlabReadError("lease_ended", f"{peer} did not renew the lease: {error}") from error
            except PeerError as error:
                raise SlabReadError("lease_ended", f"{peer} did not renew the lease: {error}") from error
            if asked_s + renewed.lasts_s <= self._lasts_until_s:
                # The lease has reached its maximum duration. A read that ends before the lease is still valid.
                return
            self._lasts_until_s = asked_s + renewed.lasts_s


FIND_S = 0.25
"""Timeout of a request to the monitor. It is short because the store has every adapter."""
SILENT_S = 2.0
"""After a failed request, the monitor is not asked again for this long."""


class SourceFinder:
    """Finds the sources of an adapter. The monitor names the peers that hold it."""

    def __init__(
        self,
        bus: Bus,
        config: Config,
        clock: Clock,
        speeds: LinkSpeeds,
        transports: PeerTransports,
        cache: SlabCache | None = None,
    ) -> None:
        self.speeds = speeds
        self._bus = bus
        self._config = config
        self.clock = clock
        self._transports = transports
        self._cache = cache
        self._silent_until_s = 0.0

    async def find(self, adapter: AdapterRef) -> list[SlabSource]:
        """Return the sources in the order in which to try them.

        If the host cache has the adapter, these are the cache and the store. Otherwise these are peers and the store.
        """
        cached = await self._cache.find(adapter) if self._cache is not None else None
        if cached is not None:
            return [cached, self._open_source(FROM_STORE)]
        holders = await self._find_holders(adapter.version)
        transports = self._config.transfer.transports
        now = self.clock.monotonic_s()
        mine = self._transports.abilities
        ordered = order_sources(holders, mine, transports, self.speeds, adapter.slab_bytes, now)
        return [self._open_source(source) for source in ordered]

    def forget(self, engine: str, incarnation: str) -> None:
        """Drop the connections to a dead peer and forget its failures."""
        self._transports.forget(engine, incarnation)
        self.speeds.forget_failures(engine)

    def avoid(self, source: ReadSource) -> None:
        """Record that a read failed, and rank its source last for 1 to 60 s."""
        self.speeds.fail_read(source, self.clock.monotonic_s())

    def _open_source(self, source: ReadSource) -> SlabSource:
        if source == FROM_STORE:
            engine = self._config.engine
            return StoreSource(self._bus, engine.load_chunk_bytes, min(SILENCE_S, engine.load_timeout_s))
        return PeerSource(self._bus, source, self._transports, self.clock)

    async def _find_holders(self, version: str) -> tuple[Holder, ...]:
        now = self.clock.monotonic_s()
        if self._transports.abilities is None or now < self._silent_until_s:
            return ()
        try:
            copies = await self._bus.request("monitor", FindCopies(version=version), Copies, FIND_S)
        except (RequestTimeoutError, PeerError):
            self._silent_until_s = now + SILENT_S
            return ()
        return copies.holders
