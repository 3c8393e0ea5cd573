"""Lets peers read adapters out of this engine's pool: answers what they ask, and says when extents are free again."""

from collections.abc import Callable, Iterable

from loraserve.adapter.format import SlabHeader, encode_header
from loraserve.bus.protocol import Bus, Envelope
from loraserve.config import Config
from loraserve.engine.leases import Lease, LeaseLimits, Leases, Reader, Refused
from loraserve.engine.pool import AdapterPool
from loraserve.engine.pool_memory import PoolMemory
from loraserve.log import get_logger
from loraserve.messages import (
    LeaseGranted,
    LeaseReleased,
    LeaseRenewed,
    LeaseSlab,
    ReleaseLease,
    RenewLease,
)
from loraserve.transfer.protocol import Exporter, Handle, TransferError, check_protocol

PoolExporter = Exporter[PoolMemory, Handle]
Lending = LeaseSlab | RenewLease | ReleaseLease


class Lender:
    """``on_ended`` is called when leases have ended, in whatever way.

    Of a reader's death an engine hears by the reader's next life; before that its leases end by their deadlines.
    """

    def __init__(self, bus: Bus, config: Config, pool: AdapterPool, on_ended: Callable[[], None]) -> None:
        self._bus = bus
        self._pool = pool
        limits = LeaseLimits(lasts_s=config.transfer.lease_s, longest_s=config.engine.load_timeout_s)
        self._leases = Leases(bus.incarnation, pool, limits)
        self._on_ended = on_ended
        self._exporters: list[PoolExporter] = []
        self._handles: tuple[Handle, ...] = ()
        self._headers: dict[str, SlabHeader] = {}
        self._log = get_logger(__name__)

    def offer(self, memory: PoolMemory, exporters: Iterable[PoolExporter]) -> None:
        """From now on grants say how the pool's memory can be read."""
        for exporter in exporters:
            self._handles += (exporter.register(memory),)
            self._exporters.append(exporter)

    def close(self) -> None:
        """Nothing of it can be read any more."""
        for exporter in self._exporters:
            exporter.close()

    def loaded(self, version: str, header: SlabHeader) -> None:
        """Of a slab that is about to be resident."""
        self._headers[version] = header

    def evicted(self, version: str) -> None:
        """Also of one that never was."""
        self._headers.pop(version, None)

    def answer(self, envelope: Envelope, now: float) -> None:
        match envelope.message:
            case LeaseSlab() as asked:
                self._grant(envelope, asked, now)
            case RenewLease(lease_id=lease_id, incarnation=incarnation):
                lease = self._leases.renew(Reader(envelope.sender, incarnation), lease_id, now)
                if isinstance(lease, Lease):
                    renewed = LeaseRenewed(lease_id=lease_id, lasts_s=lease.deadline_s - now)
                    self._bus.respond(envelope, renewed)
                else:
                    self._refuse(envelope, lease)
            case ReleaseLease(lease_id=lease_id, incarnation=incarnation):
                held = self._leases.release(Reader(envelope.sender, incarnation), lease_id, now)
                if isinstance(held, bool):
                    self._bus.respond(envelope, LeaseReleased(lease_id=lease_id, held=held))
                else:
                    self._refuse(envelope, held)
        self._end()

    def expire(self, now: float) -> None:
        """From time to time: an extent is free again so much later than its leases' deadlines."""
        self._leases.expire(now)
        self._end()

    def validate(self) -> None:
        """Leases are as they should be, and headers are there of all that can be lent and of nothing else."""
        self._leases.validate()
        resident = {entry.adapter.version for entry in self._pool.entries() if entry.resident}
        assert self._headers.keys() == resident, "headers and residents differ"

    def _grant(self, envelope: Envelope, asked: LeaseSlab, now: float) -> None:
        lease = self._granted(Reader(envelope.sender, asked.incarnation), asked, now)
        if isinstance(lease, Refused):
            self._refuse(envelope, lease)
            return
        granted = LeaseGranted(
            lease_id=lease.lease_id,
            version=lease.version,
            offset_bytes=lease.offset_bytes,
            slab_bytes=asked.slab_bytes,
            lasts_s=lease.deadline_s - now,
            handles=self._handles,
        )
        self._bus.respond(envelope, granted, [encode_header(self._headers[lease.version])])

    def _granted(self, reader: Reader, asked: LeaseSlab, now: float) -> Lease | Refused:
        try:
            check_protocol(self._bus.name, asked.protocol)
        except TransferError as error:
            return Refused(error.code, error.message)
        return self._leases.grant(reader, asked.read_id, asked.version, asked.slab_bytes, now)

    def _refuse(self, envelope: Envelope, refusal: Refused) -> None:
        self._log.info("lease_refused", reader=envelope.sender, code=refusal.code, reason=refusal.message)
        self._bus.refuse(envelope, refusal.code, f"{self._bus.name}: {refusal.message}")

    def _end(self) -> None:
        ended = self._leases.take_ended()
        for each in ended:
            if each.why != "released":
                lease = each.lease
                self._log.warning("lease_ended", why=each.why, reader=lease.reader.name, version=lease.version)
        if ended:
            self._on_ended()
