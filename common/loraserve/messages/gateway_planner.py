"""Gateway (for an operator) -> planner: show the plan, plan now, drain an engine."""

from loraserve.messages.base import Message
from loraserve.messages.planner_router import Move, Plan


class GetPlan(Message, frozen=True, tag=True, kw_only=True):
    """Request. Answered by the current Plan."""


class Rebalance(Message, frozen=True, tag=True, kw_only=True):
    """Request: plan now, without waiting for the interval. ``dry_run`` changes nothing. Answered by RebalanceDone."""

    dry_run: bool = False


class Drain(Message, frozen=True, tag=True, kw_only=True):
    """Request: empty an engine (``on``) or use it again. Remembered over restarts of the planner.

    Answered by RebalanceDone when the new plan is in force or has failed. Requests that run on the engine finish.
    """

    engine: str
    on: bool


class RebalanceDone(Message, frozen=True, tag=True, kw_only=True):
    """Answer to Rebalance and Drain. ``applied`` is False for dry runs and if nothing had to change.

    ``failed`` says in words what could not be done.
    """

    plan: Plan
    moves: tuple[Move, ...]
    applied: bool
    message: str = ""
    failed: tuple[str, ...] = ()
