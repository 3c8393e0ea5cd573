"""A scripted engine that reads from engine-0: it asks for leases, renews them and releases them."""

from typing import Any

from loraserve.messages import (
    AdapterRef,
    LeaseGranted,
    LeaseReleased,
    LeaseRenewed,
    LeaseSlab,
    ReleaseLease,
    RenewLease,
    ToEngine,
)
from loraserve.messages.transfer import TRANSFER_PROTOCOL_VERSION
from loraserve.testing.memory_bus import MemoryNetwork

TIMEOUT_S = 20.0


class LeasingPeer:
    def __init__(self, network: MemoryNetwork, name: str = "engine-1") -> None:
        self.bus = network.bus(name, ToEngine)

    async def lease(self, ref: AdapterRef, read_id: str = "read", **other: Any) -> tuple[LeaseGranted, bytes]:
        """Ask for a lease and return it with the slab's header. ``other`` replaces fields of the message."""
        fields: dict[str, Any] = {
            "version": ref.version,
            "slab_bytes": ref.slab_bytes,
            "protocol": TRANSFER_PROTOCOL_VERSION,
            **other,
        }
        asked = LeaseSlab(incarnation=self.bus.incarnation, read_id=read_id, **fields)
        granted, (header,) = await self.bus.request_frames("engine-0", asked, LeaseGranted, TIMEOUT_S)
        return granted, bytes(header)

    async def renew(self, lease_id: str) -> LeaseRenewed:
        renewal = RenewLease(lease_id=lease_id, incarnation=self.bus.incarnation)
        return await self.bus.request("engine-0", renewal, LeaseRenewed, TIMEOUT_S)

    async def release(self, lease_id: str) -> bool:
        """Release a lease and return whether the engine still held it."""
        release = ReleaseLease(lease_id=lease_id, incarnation=self.bus.incarnation)
        return (await self.bus.request("engine-0", release, LeaseReleased, TIMEOUT_S)).held
