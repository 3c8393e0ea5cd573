"""Planner -> router (publication ``plan``): where copies live and what share of traffic each should take."""

import msgspec

from loraserve.messages.base import Message


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """One copy. Shares of an adapter's copies sum to 1."""

    version: str
    name: str
    engine: str
    share: float


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """One difference between two plans. ``source`` or ``target`` "" means that a copy appears or goes.

    ``gain_s``: how much sooner requests start after it than before, in the predicted P95 TTFT; memory is no gain.
    """

    version: str
    name: str
    source: str
    target: str
    slab_bytes: int
    reason: str
    gain_s: float = 0.0


class Plan(Message, frozen=True, tag=True, kw_only=True):
    """A complete plan. Epochs only grow, over restarts of the planner too; those that were given up leave gaps.

    ``drained`` engines get no new requests while any other is ready.
    """

    epoch: int
    created_unix_s: float
    placements: tuple[Placement, ...]
    drained: tuple[str, ...] = ()
