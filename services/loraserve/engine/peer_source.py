"""A peer engine as a source: a lease on the slab's extent, a one-sided read, and the lease's end."""

import asyncio
import secrets
import time

from loraserve.adapter.format import SlabHeader
from loraserve.bus.protocol import Bus
from loraserve.engine.landing import Landing
from loraserve.engine.link_speeds import Way
from loraserve.engine.readers import Readers
from loraserve.engine.source import Damaged, LoadFailed, checked_header
from loraserve.errors import PeerError, RequestTimeout
from loraserve.messages import (
    AdapterRef,
    LeaseGranted,
    LeaseRenewed,
    LeaseSlab,
    ReleaseLease,
    RenewLease,
    SlabDamaged,
)
from loraserve.transfer.protocol import PROTOCOL, Handle, TransferError

ANSWER_S = 2.0
"""An owner that is alive answers in milliseconds."""
RENEW_AT = 0.5
"""Of what a lease lasts."""
SOONEST_S = 0.01


class PeerSource:
    """See Source."""

    def __init__(self, bus: Bus, way: Way, readers: Readers) -> None:
        self.way = way
        self._bus = bus
        self._readers = readers
        self._granted: LeaseGranted | None = None
        self._lasts_until_s = 0.0

    async def open(self, adapter: AdapterRef) -> SlabHeader:
        asked = LeaseSlab(
            protocol=PROTOCOL,
            incarnation=self._bus.incarnation,
            read_id=secrets.token_hex(8),
            version=adapter.version,
            slab_bytes=adapter.slab_bytes,
        )
        asked_s = time.monotonic()
        try:
            granted, frames = await self._bus.request_frames(self.way.source, asked, LeaseGranted, ANSWER_S)
        except RequestTimeout as error:
            raise LoadFailed("timeout", f"{self.way.source} did not answer: {error}") from error
        except PeerError as error:
            raise LoadFailed(error.code, error.message) from error
        self._granted = granted
        self._lasts_until_s = asked_s + granted.lasts_s
        return checked_header(adapter, frames[0] if frames else None, granted.slab_bytes, self.way.source)

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
            self._bus.send(self.way.source, complaint)
        release = ReleaseLease(lease_id=granted.lease_id, incarnation=self._bus.incarnation)
        # One-way: where it is lost the lease ends by its deadline.
        self._bus.send(self.way.source, release)

    def _handle(self, granted: LeaseGranted) -> Handle:
        """Its owner's word for who owns the memory is not enough: what is read is asked of the one that leased it."""
        for handle in granted.handles:
            if handle.transport == self.way.transport and handle.owner == self.way.source:
                return handle
        raise LoadFailed("refused", f"{self.way.source} does not offer {self.way.transport} any more", of_way=True)

    async def _renew(self, granted: LeaseGranted) -> None:
        """For as long as it reads."""
        renewal = RenewLease(lease_id=granted.lease_id, incarnation=self._bus.incarnation)
        while True:
            await asyncio.sleep(max(SOONEST_S, RENEW_AT * (self._lasts_until_s - time.monotonic())))
            asked_s = time.monotonic()
            try:
                renewed = await self._bus.request(self.way.source, renewal, LeaseRenewed, ANSWER_S)
            except RequestTimeout as error:
                if time.monotonic() < self._lasts_until_s:
                    # Its processor may be busy, and its memory is read without it.
                    continue
                raise LoadFailed("lease_ended", f"{self.way.source} did not renew the lease: {error}") from error
            except PeerError as error:
                raise LoadFailed("lease_ended", f"{self.way.source} did not renew the lease: {error}") from error
            if asked_s + renewed.lasts_s <= self._lasts_until_s:
                # It has lasted as long as any may: what is read until its end still counts.
                return
            self._lasts_until_s = asked_s + renewed.lasts_s
