"""How long reads from each source take, learned from those that were done. Pure.

Seconds over bytes are fitted by a line, latency and time per byte, with older reads counting less (least squares with
exponential forgetting). What a transport does elsewhere is where a new pair begins, so that no source must be tried
before it can be compared.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from loraserve.messages import Holder, ReadCounts
from loraserve.messages.transfer import Abilities, Transport
from loraserve.transfer.protocol import choose_transports

MIB = 1 << 20
FORGETTING = 0.9
"""Weight of what was known before, at each read: about the last twenty count."""
PRIOR_WEIGHT = 0.5
"""Of each of the two reads that a pair is believed to have done before its first, small and large."""
LEAST_SLOPE = 8.0
"""A time per byte so many times shorter than the mean read's is made of noise: of reads all about as long."""
SMALL_BYTES, LARGE_BYTES = MIB // 4, 64 * MIB
FIRST_AVOIDANCE_S, LONGEST_AVOIDANCE_S = 1.0, 60.0
STORE = "store"


class Way(NamedTuple):
    """From whom, and over what: a peer's name and a transport; ``store`` and ``bus``."""

    source: str
    transport: str


class Speed(msgspec.Struct, frozen=True):
    """A read of n bytes takes latency_s + n / bytes_per_s."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, length_bytes: int) -> float:
        return self.latency_s + length_bytes / self.bytes_per_s


EXPECTED = {
    "memory": Speed(0.0005, 4e9),
    "cuda_ipc": Speed(0.001, 40e9),
    "verbs": Speed(0.001, 10e9),
    "shm": Speed(0.001, 2e9),
    "tcp": Speed(0.003, 0.8e9),
    "bus": Speed(0.004, 0.4e9),
}
"""Before anything was measured; ``bus`` is the store, ``memory`` this engine's own host cache."""


class _Line:
    """Weighted sums of the reads done, from which the line is fitted; bytes in MiB."""

    def __init__(self, before: Speed) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        for length_bytes in (SMALL_BYTES, LARGE_BYTES):
            self._add(PRIOR_WEIGHT, length_bytes, before.seconds(length_bytes))
        self._before = before

    def learn(self, length_bytes: int, seconds: float) -> None:
        for name in ("_weight", "_x", "_y", "_xx", "_xy"):
            setattr(self, name, FORGETTING * getattr(self, name))
        self._add(1.0, length_bytes, seconds)

    def _add(self, weight: float, length_bytes: int, seconds: float) -> None:
        x = length_bytes / MIB
        self._weight += weight
        self._x += weight * x
        self._y += weight * seconds
        self._xx += weight * x * x
        self._xy += weight * x * seconds

    def speed(self) -> Speed:
        """Reads all of one size say nothing of the slope: what was believed before divides them."""
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        spread = self._xx / self._weight - mean_x * mean_x
        slope = (self._xy / self._weight - mean_x * mean_y) / spread if spread > 1e-6 * mean_x * mean_x else 0.0
        latency_s = mean_y - slope * mean_x
        share = self._before.latency_s / self._before.seconds(max(1, int(mean_x * MIB)))
        usual = (1 - share) * mean_y / mean_x
        if latency_s < 0 or slope < usual / LEAST_SLOPE:
            # All of it is latency, or none, or noise: the line through the mean read, split as it was before.
            latency_s, slope = share * mean_y, usual
        return Speed(latency_s, MIB / slope)


class _Pair:
    def __init__(self, before: Speed) -> None:
        self.line = _Line(before)
        self.under_way = 0
        self.failures = 0
        self.avoided_until_s = 0.0


class LinkSpeeds:
    """By way; ways of one transport lend each other what they know."""

    def __init__(self) -> None:
        self._pairs: dict[Way, _Pair] = {}
        self._transports: dict[str, _Line] = {}

    def predict(self, way: Way, length_bytes: int) -> float:
        """Seconds, if it began now: reads under way from there take their share."""
        pair = self._pairs.get(way)
        return (1 + (pair.under_way if pair else 0)) * self.speed(way).seconds(length_bytes)

    def under_way_s(self, way: Way, length_bytes: int) -> float:
        """Seconds that a read which is under way takes, if nothing comes to it and nothing goes."""
        pair = self._pairs.get(way)
        return max(1, pair.under_way if pair else 0) * self.speed(way).seconds(length_bytes)

    def speed(self, way: Way) -> Speed:
        pair = self._pairs.get(way)
        if pair is not None:
            return pair.line.speed()
        return self._transport(way.transport).speed()

    def avoided(self, way: Way, now: float) -> bool:
        """It failed lately; longer the more often it did in a row."""
        pair = self._pairs.get(way)
        return pair is not None and pair.avoided_until_s > now

    def began(self, way: Way) -> None:
        self._pair(way).under_way += 1

    def done(self, way: Way, length_bytes: int, seconds: float) -> None:
        """It was read, alone for ``seconds``."""
        pair = self._pair(way)
        pair.under_way -= 1
        pair.failures, pair.avoided_until_s = 0, 0.0
        if seconds > 0:
            pair.line.learn(length_bytes, seconds)
            self._transport(way.transport).learn(length_bytes, seconds)

    def given_up(self, way: Way) -> None:
        """By this side: that says nothing of the way."""
        self._pair(way).under_way -= 1

    def failed(self, way: Way, now: float) -> None:
        pair = self._pair(way)
        pair.under_way -= 1
        avoidance_s = min(LONGEST_AVOIDANCE_S, FIRST_AVOIDANCE_S * 2.0**pair.failures)
        pair.failures = min(pair.failures + 1, 16)
        pair.avoided_until_s = now + avoidance_s

    def gone(self, source: str) -> None:
        """It died: what comes under its name is another process, at the same place."""
        for way, pair in self._pairs.items():
            if way.source == source:
                pair.failures, pair.avoided_until_s = 0, 0.0

    def _pair(self, way: Way) -> _Pair:
        pair = self._pairs.get(way)
        if pair is None:
            pair = self._pairs[way] = _Pair(self._transport(way.transport).speed())
        return pair

    def _transport(self, transport: str) -> _Line:
        line = self._transports.get(transport)
        if line is None:
            line = self._transports[transport] = _Line(EXPECTED[transport])
        return line


class SharedLink:
    """While n loads are under way, each has 1/n of every second: a load's own time is what it would take alone.

    Whoever reckons with the result counts the loads before it itself, and would count them twice.
    """

    def __init__(self) -> None:
        self._loads = 0
        self._share_s = 0.0
        """Seconds that a load would have been given that was here since the beginning."""
        self._until_s = 0.0

    def begin(self, now: float) -> float:
        """What ``end`` wants to be told."""
        self._advance(now)
        self._loads += 1
        return self._share_s

    def end(self, began: float, now: float) -> float:
        """The load's own seconds."""
        self._advance(now)
        self._loads -= 1
        return self._share_s - began

    def _advance(self, now: float) -> None:
        if self._loads:
            self._share_s += (now - self._until_s) / self._loads
        self._until_s = now


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


MOST_PEERS = 3
"""Tried before the store at most: each that fails costs its time."""
FROM_STORE = Way(STORE, "bus")
HEDGE_FACTOR, HEDGE_FLOOR_S = 4.0, 0.25
"""A read is given so many times its predicted time, and never less than this, before another source is tried as well:
copies of the same bytes by processes of one busy machine were seen to take three times their median now and then."""


def ways(
    holders: Iterable[Holder],
    mine: Abilities | None,
    preferred: Sequence[Transport],
    speeds: LinkSpeeds,
    slab_bytes: int,
    now: float,
) -> list[Way]:
    """By predicted time, those that failed lately last; the store is among them, after a few peers at the latest.

    Of one peer's transports all that reach are there: where one fails for itself the next may do.
    """

    def late(way: Way) -> tuple[bool, float]:
        return speeds.avoided(way, now), speeds.predict(way, slab_bytes)

    by_peer = [
        [Way(holder.engine, transport) for transport in choose_transports(mine, holder.abilities, preferred)]
        for holder in holders
        if mine is not None
    ]
    nearest = sorted((each for each in by_peer if each), key=lambda each: min(map(late, each)))[:MOST_PEERS]
    return sorted([way for each in nearest for way in each] + [FROM_STORE], key=late)


def hedge_after_s(predicted_s: float) -> float:
    """How long the first source is waited for alone."""
    return max(HEDGE_FLOOR_S, HEDGE_FACTOR * predicted_s)
