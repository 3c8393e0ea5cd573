"""How many slabs came from where, and how many did not. Pure."""

import msgspec

from loraserve.engine.link_speeds import LinkSpeeds, Way
from loraserve.messages import ReadCounts

MOST_WAYS = 256
"""Peers come and go under other names; what was read from the longest forgotten one is forgotten too."""


class _Count(msgspec.Struct):
    reads: int = 0
    read_bytes: int = 0
    failed: int = 0
    mismatched: int = 0


class ReadTally:
    """By way, since the engine began."""

    def __init__(self) -> None:
        self._counts: dict[Way, _Count] = {}

    def done(self, way: Way, slab_bytes: int) -> None:
        count = self._of(way)
        count.reads += 1
        count.read_bytes += slab_bytes

    def failed(self, way: Way, mismatched: bool) -> None:
        count = self._of(way)
        count.failed += 1
        count.mismatched += mismatched

    def counts(self, speeds: LinkSpeeds) -> tuple[ReadCounts, ...]:
        """For the engine's report, by source and transport."""
        return tuple(
            ReadCounts(
                source=way.source,
                transport=way.transport,
                predicted_bytes_per_s=speeds.speed(way).bytes_per_s if count.reads else 0.0,
                **msgspec.structs.asdict(count),
            )
            for way, count in sorted(self._counts.items())
        )

    def _of(self, way: Way) -> _Count:
        count = self._counts.pop(way, None) or _Count()
        self._counts[way] = count
        if len(self._counts) > MOST_WAYS:
            del self._counts[next(iter(self._counts))]
        return count
