"""Gateway (for an operator) -> planner: plan now, or show the plan."""

from loraserve.messages.base import Message
from loraserve.messages.planner_router import Move, Plan


class GetPlan(Message, frozen=True, tag=True, kw_only=True):
    """Answered by the current Plan."""


class Rebalance(Message, frozen=True, tag=True, kw_only=True):
    """Plan from the demand seen so far, without waiting for the interval. ``dry_run`` changes nothing."""

    dry_run: bool = False


class Drain(Message, frozen=True, tag=True, kw_only=True):
    """Empty an engine (``on``) or use it again: remembered over restarts, and rolled out at once.

    Answered by RebalanceDone once the plan without it is in force, or could not be; requests that run there finish.
    """

    engine: str
    on: bool


class RebalanceDone(Message, frozen=True, tag=True, kw_only=True):
    """``applied`` False for dry runs and when nothing was to be done. ``failed`` says what could not be, in words."""

    plan: Plan
    moves: tuple[Move, ...]
    applied: bool
    message: str = ""
    failed: tuple[str, ...] = ()
