"""Lends this engine's slabs to peers: answers lease requests and checks slabs that peers report as damaged."""

from loraserve.adapter.format import encode_header
from loraserve.bus.protocol import Bus, Envelope
from loraserve.config import Config
from loraserve.engine.adapters.pool import AdapterPool
from loraserve.engine.host_cache.tier import CacheTier
from loraserve.engine.lending.leases import Lease, LeaseLimits, LeaseReader, LeaseRefusal, Leases, LendableSlabs
from loraserve.engine.lending.offers import MemoryOffers
from loraserve.engine.loading.slab_reader import SlabReader
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
from loraserve.story import Story
from loraserve.transfer.protocol import TransferError, check_protocol


class _Region:
    """A memory that lends slabs, its leases, and the handles with which peers read it."""

    def __init__(self, slabs: LendableSlabs, leases: Leases, handles: tuple[Handle, ...]) -> None:
        self.slabs = slabs
        self.leases = leases
        self.handles = handles


class Lender:
    """Lends slabs from the pool, or from the host cache if the pool cannot lend them.

    A dead reader's leases end when the monitor reports its death, when its successor requests a lease, or at their
    deadlines. Methods that may end leases return whether any ended, because this may make room.
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
        """Answer a LeaseSlab, RenewLease or ReleaseLease request; return whether leases ended."""
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

    async def check_copies(self, version: str, reader: SlabReader) -> bool:
        """Check this engine's copies of a slab; return whether the one in the pool is damaged.

        A damaged copy in the host cache is dropped. Returns False if a check of the version is already in progress.
        """
        if version in self._checking:
            return False
        self._checking.add(version)
        try:
            await self._cache.check_copy(version)
            return await self._is_damaged_in_pool(version, reader)
        finally:
            self._checking.remove(version)

    def end_reader(self, reader: LeaseReader, now: float) -> bool:
        """End the leases of a dead reader; return whether it had any."""
        for region in self._regions:
            region.leases.end_reader(reader, now)
        return self._log_ended()

    def expire(self, now: float) -> bool:
        """End the leases past their deadlines; return whether there were any. Call this periodically."""
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

    async def _is_damaged_in_pool(self, version: str, reader: SlabReader) -> bool:
        entry = self._pool.get(version)
        if entry is None or entry.header is None:
            return False
        layer = await reader.find_damage(entry.header, entry.offset_bytes)
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
        """Return the read's existing lease, or a lease from the first region that grants one, or a refusal.

        Regions with handles are asked first. A ``not_found`` refusal is returned only if every region gives it.
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
        """Return the `Leases` that hold this id, or the pool's if none do."""
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
