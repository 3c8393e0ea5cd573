"""Where to read an adapter from: those that hold it, soonest first. Pure."""

from collections.abc import Iterable, Sequence

from loraserve.engine.link_speeds import STORE, LinkSpeeds, Way
from loraserve.messages import Holder
from loraserve.transfer.choice import Abilities, choose
from loraserve.transfer.protocol import Transport

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
        [Way(holder.engine, transport) for transport in choose(mine, holder.abilities, preferred)]
        for holder in holders
        if mine is not None
    ]
    nearest = sorted((each for each in by_peer if each), key=lambda each: min(map(late, each)))[:MOST_PEERS]
    return sorted([way for each in nearest for way in each] + [FROM_STORE], key=late)


def hedge_after_s(predicted_s: float) -> float:
    """How long the first source is waited for alone."""
    return max(HEDGE_FLOOR_S, HEDGE_FACTOR * predicted_s)
