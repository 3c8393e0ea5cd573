"""Predicts how long a read from each source takes, and orders the sources of an adapter.

The time of a read is modelled as a latency plus a time per byte. Both are fitted by least squares with exponential
forgetting. A new source starts with the speed of other sources over its transport, so that it can be ranked before it
is first read.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from loraserve.messages import Holder, ReadCounts
from loraserve.messages.transfer import Abilities, Transport
from loraserve.transfer.protocol import choose_transports

MIB = 1 << 20
FORGETTING = 0.9
"""Each read multiplies the weight of all earlier reads by this: about the last twenty reads count."""
PRIOR_WEIGHT = 0.5
"""The fit for a new source starts with two assumed reads, of SMALL_BYTES and LARGE_BYTES, each of this weight."""
LEAST_SLOPE = 8.0
"""A fitted time per byte below 1/LEAST_SLOPE of the estimated one is noise."""
SMALL_BYTES, LARGE_BYTES = MIB // 4, 64 * MIB
FIRST_AVOIDANCE_S, LONGEST_AVOIDANCE_S = 1.0, 60.0
MOST_COUNTED = 256
"""Maximum number of sources with counts. The least recently read source is dropped first."""
MOST_PEERS = 3
"""Maximum number of peers among the sources of one read. It limits the time lost to failing peers."""
HEDGE_FACTOR, HEDGE_FLOOR_S = 4.0, 0.25
"""A hedge starts after this multiple of the predicted time, but not before the floor. Copies of the same bytes on a
busy machine occasionally took three times their median."""
STORE = "store"


class ReadSource(NamedTuple):
    """A source and its transport. ``name`` is the name of a peer, ``store`` or ``cache``."""

    name: str
    transport: str


FROM_STORE = ReadSource(STORE, "bus")


class ReadSpeed(msgspec.Struct, frozen=True):
    """A model of read times: a read of n bytes takes ``latency_s + n / bytes_per_s`` seconds."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, length_bytes: int) -> float:
        return self.latency_s + length_bytes / self.bytes_per_s


EXPECTED = {
    "memory": ReadSpeed(0.0005, 4e9),
    "cuda_ipc": ReadSpeed(0.001, 40e9),
    "verbs": ReadSpeed(0.001, 10e9),
    "shm": ReadSpeed(0.001, 2e9),
    "tcp": ReadSpeed(0.003, 0.8e9),
    "bus": ReadSpeed(0.004, 0.4e9),
}
"""The speeds assumed before the first read, by transport. ``bus`` reads the store, ``memory`` the host cache."""


class _FittedLine:
    """Fits a line to read times by weighted least squares: x is the size in MiB, y the time in seconds."""

    def __init__(self, prior: ReadSpeed) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        for length_bytes in (SMALL_BYTES, LARGE_BYTES):
            self._add(PRIOR_WEIGHT, length_bytes, prior.seconds(length_bytes))
        self._prior = prior

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

    def speed(self) -> ReadSpeed:
        """Return the fitted speed.

        If no plausible line fits the reads, for example because all have one size, the mean read time is divided into
        latency and transfer time. Their ratio is that of the speed assumed before the first read.
        """
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        spread = self._xx / self._weight - mean_x * mean_x
        slope = (self._xy / self._weight - mean_x * mean_y) / spread if spread > 1e-6 * mean_x * mean_x else 0.0
        latency_s = mean_y - slope * mean_x
        share = self._prior.latency_s / self._prior.seconds(max(1, int(mean_x * MIB)))
        usual = (1 - share) * mean_y / mean_x
        if latency_s < 0 or slope < usual / LEAST_SLOPE:
            # The fit is invalid or noise: split the mean time in the prior's ratio.
            latency_s, slope = share * mean_y, usual
        return ReadSpeed(latency_s, MIB / slope)


class _SourceSpeed:
    def __init__(self, prior: ReadSpeed) -> None:
        self.line = _FittedLine(prior)
        self.under_way = 0
        self.failures = 0
        self.avoided_until_s = 0.0


class LinkSpeeds:
    """The speed of each source, learned from its reads. A new source starts with the speed of its transport."""

    def __init__(self) -> None:
        self._sources: dict[ReadSource, _SourceSpeed] = {}
        self._transports: dict[str, _FittedLine] = {}

    def predict(self, source: ReadSource, length_bytes: int) -> float:
        """Return the seconds that a new read would take, concurrently with the source's reads in progress."""
        known = self._sources.get(source)
        return (1 + (known.under_way if known else 0)) * self.speed(source).seconds(length_bytes)

    def predict_under_way(self, source: ReadSource, length_bytes: int) -> float:
        """Return the total seconds of a read in progress, if the source's number of reads does not change."""
        known = self._sources.get(source)
        return max(1, known.under_way if known else 0) * self.speed(source).seconds(length_bytes)

    def speed(self, source: ReadSource) -> ReadSpeed:
        known = self._sources.get(source)
        if known is not None:
            return known.line.speed()
        return self._transport(source.transport).speed()

    def is_avoided(self, source: ReadSource, now: float) -> bool:
        """Return whether to avoid the source: for 1 s after a failure, doubled by each consecutive one, up to 60 s."""
        known = self._sources.get(source)
        return known is not None and known.avoided_until_s > now

    def begin_read(self, source: ReadSource) -> None:
        """Record the start of a read. ``finish_read``, ``abandon_read`` or ``fail_read`` ends it."""
        self._source(source).under_way += 1

    def finish_read(self, source: ReadSource, length_bytes: int, own_s: float) -> None:
        """End a successful read and learn from it. ``own_s`` is the seconds it would have taken alone."""
        known = self._source(source)
        known.under_way -= 1
        known.failures, known.avoided_until_s = 0, 0.0
        if own_s > 0:
            known.line.learn(length_bytes, own_s)
            self._transport(source.transport).learn(length_bytes, own_s)

    def abandon_read(self, source: ReadSource) -> None:
        """End a read that this engine cancelled, without learning from it."""
        self._source(source).under_way -= 1

    def fail_read(self, source: ReadSource, now: float) -> None:
        """End a read that failed, and avoid its source for 1 to 60 s."""
        known = self._source(source)
        known.under_way -= 1
        avoidance_s = min(LONGEST_AVOIDANCE_S, FIRST_AVOIDANCE_S * 2.0**known.failures)
        known.failures = min(known.failures + 1, 16)
        known.avoided_until_s = now + avoidance_s

    def forget_failures(self, name: str) -> None:
        """Stop avoiding a dead peer: a new process will take its name."""
        for source, known in self._sources.items():
            if source.name == name:
                known.failures, known.avoided_until_s = 0, 0.0

    def _source(self, source: ReadSource) -> _SourceSpeed:
        known = self._sources.get(source)
        if known is None:
            known = self._sources[source] = _SourceSpeed(self._transport(source.transport).speed())
        return known

    def _transport(self, transport: str) -> _FittedLine:
        line = self._transports.get(transport)
        if line is None:
            line = self._transports[transport] = _FittedLine(EXPECTED[transport])
        return line


class SharedLink:
    """Estimates how long overlapping loads would each have taken alone.

    While n loads are in progress, each is charged 1/n of the elapsed time. `LinkSpeeds.predict` does the reverse: it
    multiplies the time alone by the number of concurrent reads from the source.
    """

    def __init__(self) -> None:
        self._loads = 0
        self._share_s = 0.0
        """The time charged so far to a hypothetical load that never ends."""
        self._updated_s = 0.0

    def begin(self, now: float) -> float:
        self._advance(now)
        self._loads += 1
        return self._share_s

    def end(self, began: float, now: float) -> float:
        self._advance(now)
        self._loads -= 1
        return self._share_s - began

    def _advance(self, now: float) -> None:
        if self._loads:
            self._share_s += (now - self._updated_s) / self._loads
        self._updated_s = now


class _SourceCounts(msgspec.Struct):
    reads: int = 0
    read_bytes: int = 0
    failed: int = 0
    mismatched: int = 0


class ReadTally:
    """Counts the reads and failures of each source since the engine started."""

    def __init__(self) -> None:
        self._counts: dict[ReadSource, _SourceCounts] = {}
        """Ordered by last read or failure, oldest first."""

    def count_read(self, source: ReadSource, slab_bytes: int) -> None:
        counts = self._of(source)
        counts.reads += 1
        counts.read_bytes += slab_bytes

    def count_failure(self, source: ReadSource, mismatched: bool) -> None:
        counts = self._of(source)
        counts.failed += 1
        counts.mismatched += mismatched

    def counts(self, speeds: LinkSpeeds) -> tuple[ReadCounts, ...]:
        return tuple(
            ReadCounts(
                source=source.name,
                transport=source.transport,
                predicted_bytes_per_s=speeds.speed(source).bytes_per_s if counts.reads else 0.0,
                **msgspec.structs.asdict(counts),
            )
            for source, counts in sorted(self._counts.items())
        )

    def _of(self, source: ReadSource) -> _SourceCounts:
        counts = self._counts.pop(source, None) or _SourceCounts()
        self._counts[source] = counts
        if len(self._counts) > MOST_COUNTED:
            del self._counts[next(iter(self._counts))]
        return counts


def order_sources(
    holders: Iterable[Holder],
    mine: Abilities | None,
    preferred: Sequence[Transport],
    speeds: LinkSpeeds,
    slab_bytes: int,
    now: float,
) -> list[ReadSource]:
    """Return the store and up to MOST_PEERS of ``holders``, ordered by predicted time to read the slab.

    Sources that failed recently come last. A peer has one source for each transport that works between it and this
    engine, because another transport may work if one fails. ``mine`` describes this engine's transports; None if it
    reads only from the store. ``preferred`` lists the transports that may be used.
    """

    def rank(source: ReadSource) -> tuple[bool, float]:
        return speeds.is_avoided(source, now), speeds.predict(source, slab_bytes)

    by_peer = [
        [ReadSource(holder.engine, transport) for transport in choose_transports(mine, holder.abilities, preferred)]
        for holder in holders
        if mine is not None
    ]
    nearest = sorted((each for each in by_peer if each), key=lambda each: min(map(rank, each)))[:MOST_PEERS]
    return sorted([source for each in nearest for source in each] + [FROM_STORE], key=rank)


def hedge_after_s(predicted_s: float) -> float:
    """Return the seconds to wait for a read, predicted to take ``predicted_s``, before a second source is read."""
    return max(HEDGE_FLOOR_S, HEDGE_FACTOR * predicted_s)
