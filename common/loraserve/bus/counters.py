"""What went wrong on the bus, counted; the metrics registry reads these."""

from collections import Counter

import structlog

_log = structlog.get_logger("loraserve.bus")

LOGGED_FIRST = 3
LOGGED_EVERY = 1000
REMEMBERED_PEERS = 1000


class BusCounters:
    """Plain counters. Strangers all count as "?", so a flood of made-up names cannot grow the tables."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self.sent = 0
        self.received = 0
        self.late_replies = 0
        self.bad: Counter[tuple[str, str]] = Counter()
        self.dropped: Counter[str] = Counter()

    def count_bad(self, sender: str, reason: str, detail: str) -> None:
        """A message that was refused or dropped because of what it held."""
        sender = sender if len(self.bad) < REMEMBERED_PEERS else "?"
        self.bad[sender, reason] += 1
        count = self.bad[sender, reason]
        if count <= LOGGED_FIRST or count % LOGGED_EVERY == 0:
            _log.warning("bad_message", bus=self._owner, sender=sender, reason=reason, detail=detail, count=count)

    def count_dropped(self, peer: str, why: str) -> None:
        """A message of ours that will not reach its peer."""
        self.dropped[peer] += 1
        count = self.dropped[peer]
        if count <= LOGGED_FIRST or count % LOGGED_EVERY == 0:
            _log.warning("message_dropped", bus=self._owner, peer=peer, why=why, count=count)
