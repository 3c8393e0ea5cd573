"""Offers the pool and the host cache to peers, with one exporter for each configured transport that works here."""

from collections.abc import Callable, Coroutine, Iterable
from functools import cached_property
from typing import Any

from loraserve.bus.protocol import Bus, Envelope
from loraserve.config import Config
from loraserve.engine.loading.memory import HostPool, LendableDevice, PoolMemory
from loraserve.errors import ConfigError
from loraserve.log import get_logger
from loraserve.messages.transfer import Handle, Transport
from loraserve.transfer.abilities import local_abilities
from loraserve.transfer.cuda_ipc import CudaIpcExporter
from loraserve.transfer.shm import ShmExporter
from loraserve.transfer.tcp import TcpExporter
from loraserve.transfer.verbs.device import RdmaDevice
from loraserve.transfer.verbs.exporter import VerbsExporter


class MemoryOffers:
    """Registers the pool and the host cache with every transport. A transport that fails is logged and left out.

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
        """The open RDMA device; this engine also reads with it."""
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
        """Return the handle of a memory; None if the transport cannot read this kind of memory."""
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
