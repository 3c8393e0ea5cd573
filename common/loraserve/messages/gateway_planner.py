"""Gateway, for an operator -> planner: show the plan, plan now, or drain an engine."""

from loraserve.messages.base import Message
from loraserve.messages.planner_router import Move, Plan


class GetPlan(Message, frozen=True, tag=True, kw_only=True):
    """Request: show the current plan. Answered by Plan."""


class Rebalance(Message, frozen=True, tag=True, kw_only=True):
    """Request: plan now, without waiting for the interval. ``dry_run`` only shows a plan. Answered by RebalanceDone."""

    dry_run: bool = False


class Drain(Message, frozen=True, tag=True, kw_only=True):
    """Request: drain an engine, or use it again if ``on`` is False. The planner keeps the setting across restarts.

    Answered by RebalanceDone when the new plan has taken effect or failed. Running requests on the engine finish.
    """

    engine: str
    on: bool


class RebalanceDone(Message, frozen=True, tag=True, kw_only=True):
    """Answer to Rebalance and Drain. ``failed`` lists descriptions of the failures.

    ``applied`` is False for a dry run, if nothing had to change, and if the new plan did not take effect.
    """

    plan: Plan
    moves: tuple[Move, ...]
    applied: bool
    message: str = ""
    failed: tuple[str, ...] = ()
