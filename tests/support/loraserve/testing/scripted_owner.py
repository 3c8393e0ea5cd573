"""A peer that holds a slab and answers requests by a script: it can refuse, stall, lie and let leases expire."""

from collections.abc import Callable
from typing import Any

from loraserve.adapter.format import encode_header
from loraserve.adapter.pack import Slab
from loraserve.bus.protocol import Bus, Envelope
from loraserve.messages import (
    Holder,
    LeaseGranted,
    LeaseRenewed,
    LeaseSlab,
    ReadRegion,
    RenewLease,
)
from loraserve.messages.transfer import TRANSFER_PROTOCOL_VERSION, Abilities
from loraserve.transfer.tcp import TcpExporter

ABLE = Abilities(protocol=TRANSFER_PROTOCOL_VERSION, host="h", neighbourhood="n", transports=("tcp",), device="cpu")
BEFORE, BEHIND = b"\x11" * 64, b"\x22" * 64


class ScriptedOwner:
    """A peer whose ``memory`` holds the slab between other bytes."""

    def __init__(self, bus: Bus, slab: Slab) -> None:
        self.bus = bus
        self.slab = slab
        self.memory = bytearray(BEFORE + bytes(slab.data) + BEHIND)
        self.exporter = TcpExporter(self.bus)
        self.handle = self.exporter.register(memoryview(self.memory))
        self.change: Callable[[LeaseGranted], LeaseGranted] = lambda granted: granted
        self.refuses = ""
        self.stalls = False
        self.held: list[Envelope] = []
        self.lasts_s = 5.0
        self.renews = True
        self.seen: list[Any] = []

    def holder(self) -> Holder:
        return Holder(engine=self.bus.name, incarnation=self.bus.incarnation, abilities=ABLE)

    async def serve(self) -> None:
        while True:
            self.answer(await self.bus.receive())

    def answer(self, envelope: Envelope) -> None:
        self.seen.append(envelope.message)
        match envelope.message:
            case LeaseSlab() if self.refuses:
                self.bus.refuse(envelope, self.refuses, "no")
            case LeaseSlab():
                granted = LeaseGranted(
                    lease_id="l",
                    version=self.slab.version,
                    offset_bytes=len(BEFORE),
                    slab_bytes=len(self.slab.data),
                    lasts_s=self.lasts_s,
                    handles=(self.handle,),
                )
                self.bus.respond(envelope, self.change(granted), [encode_header(self.slab.header)])
            case RenewLease() if self.renews:
                self.bus.respond(envelope, LeaseRenewed(lease_id="l", lasts_s=self.lasts_s))
            case RenewLease():
                self.bus.refuse(envelope, "expired", "the lease has ended")
            case ReadRegion() if self.stalls:
                self.held.append(envelope)
            case ReadRegion():
                self.exporter.answer(envelope)

    def resume(self) -> None:
        self.stalls = False
        while self.held:
            self.exporter.answer(self.held.pop())

    def count(self, kind: type[Any]) -> int:
        """Return the number of received messages of one type."""
        return sum(isinstance(each, kind) for each in self.seen)
