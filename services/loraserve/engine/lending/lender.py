"""Lends this engine's slabs to peers.

`MemoryOffers` registers the pool and the host cache with each configured transport that works here. `Lender` answers
lease requests and checks slabs that peers report as damaged.
"""

from collections.abc import Callable, Coroutine, Iterable
from functools import cached_property
from typing import Any, NamedTuple

from loraserve.adapter.format import encode_header
from loraserve.bus.protocol import Bus, Envelope
from loraserve.config import Config
from loraserve.engine.adapters.pool import AdapterPool
from loraserve.engine.host_cache.tier import CacheTier
from loraserve.engine.lending.leases import Lease, LeaseLimits, LeaseReader, LeaseRefusal, Leases, LendableSlabs
from loraserve.engine.loading.loader import AdapterLoader
from loraserve.engine.loading.memory import HostPool, LendableDevice, PoolMemory
from loraserve.errors import ConfigError
from loraserve.log import get_logger
from loraserve.messages import (
    LeaseGranted,
    LeaseReleased,
    LeaseRenewed,
    LeaseSlab,
    ReleaseLease,
    RenewLease,
    SlabDamaged,
)
from loraserve.messages.transfer import Handle, Transport
from loraserve.story import Story
from loraserve.transfer.abilities import local_abilities
from loraserve.transfer.cuda_ipc import CudaIpcExporter
from loraserve.transfer.protocol import TransferError, check_protocol
from loraserve.transfer.shm import ShmExporter
from loraserve.transfer.tcp import TcpExporter
from loraserve.transfer.verbs.device import RdmaDevice
from loraserve.transfer.verbs.exporter import VerbsExporter


class MemoryOffers:
    """Registers the pool and the host cache with the configured transports. A transport that fails is left out.

    Peers read the pool with ``handles`` and the host cache with ``cache_handles``. Create this when the engine starts:
    registering memory with an RDMA device blocks.
    """

    def __init__(self, bus: Bus, config: Config, pool: PoolMemory, cache: HostPool | None = None) -> None:
        self._bus = bus
        self._log = get_logger(__name__)
        self._closing: list[Callable[[], None]] = []
        self._tcp: TcpExporter | None = None
        self._verbs: tuple[RdmaDevice, VerbsExporter] | None = None
        self.device: RdmaDevice | None = None
        """The open RDMA device. This engine also reads with it."""
        gpu = pool.memory if isinstance(pool, LendableDevice) else None
        kind, number = ("cpu", 0) if gpu is None else ("cuda", gpu.device)
        possible = local_abilities(config.transfer.transports, kind, number).transports
        transports = [each for each in config.transfer.transports if each in possible]
        self.handles = self._register_all(pool, transports)
        self.abilities = local_abilities([handle.transport for handle in self.handles], kind, number)
        """The transports over which peers can read the pool. This engine reads from peers over the same transports."""
        self.cache_handles = self._register_all(cache, transports) if cache is not None else ()
        cache_transports = [handle.transport for handle in self.cache_handles]
        self.cache_abilities = local_abilities(cache_transports, "cpu") if cache is not None else None

    def answer_read(self, envelope: Envelope) -> Coroutine[Any, Any, None] | None:
        """Answer a ReadRegion request, or return a coroutine that reads the device in a thread and answers."""
        if self._tcp is not None:
            return self._tcp.answer(envelope)
        self._refuse(envelope, "tcp")
        return None

    async def connect(self, envelope: Envelope) -> None:
        if self._verbs is not None:
            await self._verbs[1].answer(envelope)
        else:
            self._refuse(envelope, "verbs")

    def forget(self, peer: str, incarnation: str) -> None:
        """Drop the connections of a dead peer."""
        if self._verbs is not None:
            self._verbs[1].forget(peer, incarnation)

    def close(self) -> None:
        self.handles = self.cache_handles = ()
        while self._closing:
            self._closing.pop()()

    def _refuse(self, envelope: Envelope, transport: Transport) -> None:
        self._bus.refuse(envelope, "refused", f"{self._bus.name} does not offer {transport}; use another transport")

    def _register_all(self, memory: PoolMemory, transports: Iterable[Transport]) -> tuple[Handle, ...]:
        handles = [self._try_register(each, memory) for each in transports]
        return tuple(handle for handle in handles if handle is not None)

    def _try_register(self, transport: Transport, memory: PoolMemory) -> Handle | None:
        try:
            return self._register(transport, memory)
        except ConfigError as error:
            self._log.warning("transport_left_out", transport=transport, reason=str(error))
            return None

    def _register(self, transport: Transport, pool: PoolMemory) -> Handle | None:
        """Register a memory and return its handle; None if the transport cannot read this kind of memory."""
        host = pool if isinstance(pool, HostPool) else None
        lendable = pool if isinstance(pool, LendableDevice) else None
        whole = host.view(0, len(host)) if host is not None else None
        gpu = lendable.memory if lendable is not None else None
        memory, readable = whole or gpu, whole or lendable
        match transport:
            case "shm" if host is not None and host.shared is not None:
                return self._shm.register(host.shared)
            case "cuda_ipc" if gpu is not None:
                return self._ipc.register(gpu)
            case "tcp" if readable is not None:
                return self._tcp_exporter().register(readable)
            case "verbs" if memory is not None:
                device, exporter = self._verbs_exporter()
                handle = exporter.register(memory)
                # Set only after register succeeds: otherwise the device cannot read into this memory either.
                self.device = device
                return handle
            case _:
                return None

    @cached_property
    def _shm(self) -> ShmExporter:
        exporter = ShmExporter(self._bus.name, self._bus.incarnation)
        self._closing.append(exporter.close)
        return exporter

    @cached_property
    def _ipc(self) -> CudaIpcExporter:
        exporter = CudaIpcExporter(self._bus.name, self._bus.incarnation)
        self._closing.append(exporter.close)
        return exporter

    def _tcp_exporter(self) -> TcpExporter:
        if self._tcp is None:
            self._tcp = TcpExporter(self._bus)
            self._closing.append(self._tcp.close)
        return self._tcp

    def _verbs_exporter(self) -> tuple[RdmaDevice, VerbsExporter]:
        if self._verbs is None:
            device = RdmaDevice()
            self._closing.append(device.close)
            self._verbs = device, VerbsExporter(self._bus, device)
            self._closing.append(self._verbs[1].close)
        return self._verbs


class _Region(NamedTuple):
    """A memory that lends slabs, its leases, and the handles with which peers read it."""

    slabs: LendableSlabs
    leases: Leases
    handles: tuple[Handle, ...]


class Lender:
    """Lends slabs from the pool, or from the host cache if the pool cannot lend them.

    A dead reader's leases end when the monitor reports its death, when its successor requests a lease, or at their
    deadlines. Methods that may end leases return whether any ended, because the slabs may then be evicted.
    """

    def __init__(
        self, bus: Bus, config: Config, pool: AdapterPool, cache: CacheTier, offers: MemoryOffers, story: Story
    ) -> None:
        self._bus = bus
        self._pool = pool
        self._cache = cache
        limits = LeaseLimits(lasts_s=config.transfer.lease_s, longest_s=config.engine.load_timeout_s)
        in_pool = Leases(bus.incarnation, pool, limits, story)
        in_cache = Leases(f"{bus.incarnation}.cache", cache.cache, limits, story)
        self._regions = (
            _Region(pool, in_pool, offers.handles),
            _Region(cache.cache, in_cache, offers.cache_handles),
        )
        self._checking: set[str] = set()
        self._log = get_logger(__name__)

    def answer(self, envelope: Envelope, now: float) -> bool:
        """Answer a LeaseSlab, RenewLease or ReleaseLease request, and return whether leases ended."""
        match envelope.message:
            case LeaseSlab() as request:
                self._answer_request(envelope, request, now)
            case RenewLease(lease_id=lease_id, incarnation=incarnation):
                lease = self._leases_with(lease_id).renew(LeaseReader(envelope.sender, incarnation), lease_id, now)
                if isinstance(lease, Lease):
                    renewed = LeaseRenewed(lease_id=lease_id, lasts_s=lease.deadline_s - now)
                    self._bus.respond(envelope, renewed)
                else:
                    self._refuse(envelope, lease)
            case ReleaseLease(lease_id=lease_id, incarnation=incarnation):
                held = self._leases_with(lease_id).release(LeaseReader(envelope.sender, incarnation), lease_id, now)
                if isinstance(held, bool):
                    self._bus.respond(envelope, LeaseReleased(lease_id=lease_id, held=held))
                else:
                    self._refuse(envelope, held)
        return self._log_ended()

    def accept_complaint(self, reader: str, complaint: SlabDamaged) -> bool:
        """Return whether to check a slab that a reader reports as damaged. Reports without a lease are ignored."""
        leases = self._leases_with(complaint.lease_id)
        if not leases.is_held(complaint.lease_id, reader, complaint.version):
            self._log.warning("complaint_without_lease", reader=reader, version=complaint.version)
            return False
        self._log.error(
            "slab_damaged",
            version=complaint.version,
            reader=reader,
            lease=complaint.lease_id,
            layer=complaint.layer,
        )
        return True

    async def check_copies(self, version: str, loader: AdapterLoader) -> bool:
        """Check this engine's copies of a slab and return whether the one in the pool is damaged.

        A damaged copy in the host cache is dropped. Returns False if a check of the version is already in progress.
        """
        if version in self._checking:
            return False
        self._checking.add(version)
        try:
            await self._cache.check_copy(version)
            return await self._is_damaged_in_pool(version, loader)
        finally:
            self._checking.remove(version)

    def end_reader(self, reader: LeaseReader, now: float) -> bool:
        """End the leases of a dead reader and return whether it had any."""
        for region in self._regions:
            region.leases.end_reader(reader, now)
        return self._log_ended()

    def expire(self, now: float) -> bool:
        """End the leases past their deadlines and return whether there were any. Call this periodically."""
        for region in self._regions:
            region.leases.expire(now)
        return self._log_ended()

    def validate(self) -> None:
        """Raise AssertionError if a lease does not match its slab or a complete slab has no header."""
        for region in self._regions:
            region.leases.validate()
            for slab in region.slabs.entries():
                has_header = slab.header is not None
                assert has_header or not slab.is_complete, f"{slab.adapter.version} is complete and has no header"

    async def _is_damaged_in_pool(self, version: str, loader: AdapterLoader) -> bool:
        entry = self._pool.get(version)
        if entry is None or entry.header is None:
            return False
        layer = await loader.find_damage(entry.header, entry.offset_bytes)
        after = self._pool.get(version)
        if after is None or after.generation != entry.generation:
            return False
        self._log.error("own_copy_checked", adapter=entry.adapter.name, version=version, damaged_layer=layer)
        return layer is not None

    def _answer_request(self, envelope: Envelope, request: LeaseSlab, now: float) -> None:
        granted = self._grant(LeaseReader(envelope.sender, request.incarnation), request, now)
        if isinstance(granted, LeaseRefusal):
            self._refuse(envelope, granted)
            return
        region, lease = granted
        answer = LeaseGranted(
            lease_id=lease.lease_id,
            version=lease.version,
            offset_bytes=lease.offset_bytes,
            slab_bytes=request.slab_bytes,
            lasts_s=lease.deadline_s - now,
            handles=region.handles,
        )
        slab = region.slabs.get(lease.version)
        assert slab is not None, "a leased slab left"
        assert slab.header is not None, "a slab without a header was leased"
        self._bus.respond(envelope, answer, [encode_header(slab.header)])

    def _grant(self, reader: LeaseReader, request: LeaseSlab, now: float) -> tuple[_Region, Lease] | LeaseRefusal:
        """Return the lease that the read already has, or else a new lease or a refusal.

        Asks pool and host cache, first the one that peers can read. Refuses with ``not_found`` if neither has the slab.
        """
        try:
            check_protocol(self._bus.name, request.protocol)
        except TransferError as error:
            return LeaseRefusal(error.code, error.message)
        for region in self._regions:
            region.leases.expire(now)
            region.leases.end_past_lives(reader, now)
        refusals: list[LeaseRefusal] = []

        def rank(region: _Region) -> tuple[bool, bool]:
            return not region.leases.has_read(reader, request.read_id, request.version), not region.handles

        for region in sorted(self._regions, key=rank):
            lease = region.leases.grant(reader, request.read_id, request.version, request.slab_bytes, now)
            if isinstance(lease, Lease):
                return region, lease
            refusals.append(lease)
        return next((refusal for refusal in refusals if refusal.code != "not_found"), refusals[0])

    def _leases_with(self, lease_id: str) -> Leases:
        """Return the `Leases` of the memory, pool or cache, that granted this lease; the pool's if it has ended."""
        return next((each.leases for each in self._regions if lease_id in each.leases), self._regions[0].leases)

    def _refuse(self, envelope: Envelope, refusal: LeaseRefusal) -> None:
        self._log.info("lease_refused", reader=envelope.sender, code=refusal.code, reason=refusal.message)
        self._bus.refuse(envelope, refusal.code, f"{self._bus.name}: {refusal.message}")

    def _log_ended(self) -> bool:
        ended = [each for region in self._regions for each in region.leases.take_ended()]
        for each in ended:
            if each.reason != "released":
                lease = each.lease
                self._log.warning("lease_ended", reason=each.reason, reader=lease.reader.name, version=lease.version)
        return bool(ended)
