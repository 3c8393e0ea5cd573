"""Planner -> routers (publication ``plan``): where copies are, and the share of the traffic that each should get."""

import msgspec

from loraserve.messages.base import Message


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """One copy of an adapter. The shares of its copies sum to 1."""

    version: str
    name: str
    engine: str
    share: float


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """One difference between two plans. ``source`` "" means a new copy, ``target`` "" a removed one.

    ``gain_s`` is the predicted decrease of the P95 TTFT by this move.
    """

    version: str
    name: str
    source: str
    target: str
    slab_bytes: int
    reason: str
    gain_s: float = 0.0


class Plan(Message, frozen=True, tag=True, kw_only=True):
    """A complete plan, published when it comes into force and again from time to time.

    Epochs grow, also over restarts of the planner; epochs that were given up leave gaps. ``drained`` engines get no new
    requests while any other engine is ready.
    """

    epoch: int
    created_unix_s: float
    placements: tuple[Placement, ...]
    drained: tuple[str, ...] = ()
