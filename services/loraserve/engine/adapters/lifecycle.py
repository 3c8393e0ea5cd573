"""One adapter of a pool, and who needs it there. Plain data."""

import msgspec

from loraserve.messages import AdapterRef


class Entry(msgspec.Struct):
    """One adapter in the pool."""

    adapter: AdapterRef
    slot: int
    offset_bytes: int
    generation: int = 0
    """Which of all that were ever placed: another entry of the same version or in the same extent differs."""
    resident: bool = False
    read: int = 0
    """The read that it was verified as, where that was told of before: see EarlyStarts."""
    cancelled: bool = False
    """Nobody wanted it while it was on its way: its load is being ended."""
    running: int = 0
    leases: int = 0
    planned: bool = False
    planned_epoch: int = 0
    """Of the last plan that wanted it here."""
    used_s: float = 0.0
    prefetch: str = ""
    """The kind for which it was brought in before any request waited for it."""
    ran: bool = False
    """A request has run with it."""

    @property
    def evictable(self) -> bool:
        return self.resident and self.running == 0 and not self.planned and not self.leases

    @property
    def cancellable(self) -> bool:
        return not (self.resident or self.cancelled or self.running)
