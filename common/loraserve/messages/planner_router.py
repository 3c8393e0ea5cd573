"""Planner -> routers (publication ``plan``): the planned copies of adapters and the traffic share of each copy."""

import msgspec

from loraserve.messages.base import Message


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """One planned copy of an adapter. The traffic shares of an adapter's copies sum to 1."""

    version: str
    name: str
    engine: str
    share: float


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """One difference between two plans. ``source`` "" means a new copy, ``target`` "" a removed copy.

    ``gain_s`` is the predicted decrease of the P95 TTFT by this move, in seconds.
    """

    version: str
    name: str
    source: str
    target: str
    slab_bytes: int
    reason: str
    gain_s: float = 0.0


class Plan(Message, frozen=True, tag=True, kw_only=True):
    """A complete plan. The planner publishes it when it takes effect, and repeats it periodically.

    Epochs increase, even across restarts of the planner. A plan that never takes effect leaves a gap. ``drained``
    engines get no new requests while any other engine is ready.
    """

    epoch: int
    created_unix_s: float
    placements: tuple[Placement, ...]
    drained: tuple[str, ...] = ()
