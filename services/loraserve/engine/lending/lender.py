"""Lets peers read what this engine has: answers what they ask, and says when extents are free again."""

from collections.abc import Callable

from loraserve.adapter.format import SlabHeader, encode_header
from loraserve.bus.protocol import Bus, Envelope
from loraserve.config import Config
from loraserve.engine.adapters.pool import AdapterPool
from loraserve.engine.host_cache.cache import HostCache
from loraserve.engine.lending.leases import Lease, LeaseLimits, Leases, Reader, Refused
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
from loraserve.messages.transfer import Handle
from loraserve.transfer.protocol import TransferError, check_protocol


class _Region:
    """A memory that slabs are lent from, which ``handles`` are of; ``header`` is that of what lies there."""

    def __init__(self, leases: Leases, header: Callable[[str], SlabHeader]) -> None:
        self.leases = leases
        self.header = header
        self.handles: tuple[Handle, ...] = ()


class Lender:
    """Lends what is in the pool, and what the host cache has where the pool cannot.

    ``on_ended`` is called when leases have ended, in whatever way; ``on_complaint`` with the version of an adapter
    that a reader found damaged. Of a reader's death an engine hears from the monitor, or by the reader's next life;
    before that its leases end by their deadlines.
    """

    def __init__(
        self,
        bus: Bus,
        config: Config,
        pool: AdapterPool,
        on_ended: Callable[[], None],
        on_complaint: Callable[[str], None],
        cache: HostCache,
    ) -> None:
        self._bus = bus
        self._pool = pool
        limits = LeaseLimits(lasts_s=config.transfer.lease_s, longest_s=config.engine.load_timeout_s)
        self._headers: dict[str, SlabHeader] = {}
        self._of_pool = _Region(Leases(bus.incarnation, pool, limits), self._headers.__getitem__)
        self._of_cache = _Region(Leases(f"{bus.incarnation}.cache", cache, limits), cache.header)
        self._regions = (self._of_pool, self._of_cache)
        self._on_ended = on_ended
        self._on_complaint = on_complaint
        self._log = get_logger(__name__)

    def offer(self, of_pool: tuple[Handle, ...], of_cache: tuple[Handle, ...] = ()) -> None:
        """From now on grants say how the pool's memory can be read, and the host cache's."""
        self._of_pool.handles = of_pool
        self._of_cache.handles = of_cache

    def loaded(self, version: str, header: SlabHeader) -> None:
        """Of a slab that is about to be resident."""
        self._headers[version] = header

    def header(self, version: str) -> SlabHeader | None:
        """Of a resident slab."""
        return self._headers.get(version)

    def evicted(self, version: str) -> SlabHeader | None:
        """Its header; None of one that never was resident."""
        return self._headers.pop(version, None)

    def answer(self, envelope: Envelope, now: float) -> None:
        match envelope.message:
            case LeaseSlab() as asked:
                self._grant(envelope, asked, now)
            case RenewLease(lease_id=lease_id, incarnation=incarnation):
                lease = self._leases_with(lease_id).renew(Reader(envelope.sender, incarnation), lease_id, now)
                if isinstance(lease, Lease):
                    renewed = LeaseRenewed(lease_id=lease_id, lasts_s=lease.deadline_s - now)
                    self._bus.respond(envelope, renewed)
                else:
                    self._refuse(envelope, lease)
            case ReleaseLease(lease_id=lease_id, incarnation=incarnation):
                held = self._leases_with(lease_id).release(Reader(envelope.sender, incarnation), lease_id, now)
                if isinstance(held, bool):
                    self._bus.respond(envelope, LeaseReleased(lease_id=lease_id, held=held))
                else:
                    self._refuse(envelope, held)
            case SlabDamaged() as damaged:
                self._complained(envelope.sender, damaged)
        self._end()

    def _complained(self, reader: str, damaged: SlabDamaged) -> None:
        """Who reads verifies; who is read hears of it, so that both sides' logs say what happened. To look is work:
        once for each lease at most."""
        if not self._leases_with(damaged.lease_id).is_of(damaged.lease_id, reader, damaged.version):
            self._log.warning("complaint_without_lease", reader=reader, version=damaged.version)
            return
        self._log.error(
            "slab_damaged", version=damaged.version, reader=reader, lease=damaged.lease_id, layer=damaged.layer
        )
        self._on_complaint(damaged.version)

    def reader_gone(self, reader: Reader, now: float) -> None:
        """It reads nothing any more."""
        for region in self._regions:
            region.leases.reader_gone(reader, now)
        self._end()

    def expire(self, now: float) -> None:
        """From time to time: an extent is free again so much later than its leases' deadlines."""
        for region in self._regions:
            region.leases.expire(now)
        self._end()

    def validate(self) -> None:
        """Leases are as they should be, and headers are there of all that can be lent and of nothing else."""
        for region in self._regions:
            region.leases.validate()
        resident = {entry.adapter.version for entry in self._pool.entries() if entry.is_complete}
        assert self._headers.keys() == resident, "headers and residents differ"

    def _grant(self, envelope: Envelope, asked: LeaseSlab, now: float) -> None:
        granted = self._granted(Reader(envelope.sender, asked.incarnation), asked, now)
        if isinstance(granted, Refused):
            self._refuse(envelope, granted)
            return
        region, lease = granted
        answer = LeaseGranted(
            lease_id=lease.lease_id,
            version=lease.version,
            offset_bytes=lease.offset_bytes,
            slab_bytes=asked.slab_bytes,
            lasts_s=lease.deadline_s - now,
            handles=region.handles,
        )
        self._bus.respond(envelope, answer, [encode_header(region.header(lease.version))])

    def _granted(self, reader: Reader, asked: LeaseSlab, now: float) -> tuple[_Region, Lease] | Refused:
        """The lease that this read has; else of the first region that gives one, those that can be read before those
        that cannot; else what speaks most of the slab."""
        try:
            check_protocol(self._bus.name, asked.protocol)
        except TransferError as error:
            return Refused(error.code, error.message)
        for region in self._regions:
            region.leases.expire(now)
            region.leases.reader_lives(reader, now)
        refusals: list[Refused] = []

        def rank(region: _Region) -> tuple[bool, bool]:
            return not region.leases.reads(reader, asked.read_id, asked.version), not region.handles

        for region in sorted(self._regions, key=rank):
            lease = region.leases.grant(reader, asked.read_id, asked.version, asked.slab_bytes, now)
            if isinstance(lease, Lease):
                return region, lease
            refusals.append(lease)
        return next((refusal for refusal in refusals if refusal.code != "not_found"), refusals[0])

    def _leases_with(self, lease_id: str) -> Leases:
        """Where nobody knows it any one can say so."""
        return next((r.leases for r in self._regions if lease_id in r.leases), self._of_pool.leases)

    def _refuse(self, envelope: Envelope, refusal: Refused) -> None:
        self._log.info("lease_refused", reader=envelope.sender, code=refusal.code, reason=refusal.message)
        self._bus.refuse(envelope, refusal.code, f"{self._bus.name}: {refusal.message}")

    def _end(self) -> None:
        ended = [each for region in self._regions for each in region.leases.take_ended()]
        for each in ended:
            if each.why != "released":
                lease = each.lease
                self._log.warning("lease_ended", why=each.why, reader=lease.reader.name, version=lease.version)
        if ended:
            self._on_ended()
