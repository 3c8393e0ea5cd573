"""The planner of a simulated cluster: the policy's placement, rolled out by the production state machine.

Writing a plan takes no time. An engine answers when it has loaded its copies. The planner waits for
``PlannerConfig.prepare_timeout_s`` at most.
"""

from collections.abc import Callable, Mapping, Sequence

from loraserve.config import PlannerConfig
from loraserve.cost import CostModel
from loraserve.engine.schedule.events import CopiesRequested, CopiesRetired
from loraserve.messages import AdapterDemand, AdapterRef, EngineLoad, Plan
from loraserve.planner.placement.moves import diff
from loraserve.planner.placement.problem import PlanInput, PlanSettings
from loraserve.planner.rollout import events
from loraserve.planner.rollout.copies import recover_placements, shares_differ
from loraserve.planner.rollout.machine import Rollout
from loraserve.sim.engine import INCARNATION, SimEngine, Timeline
from loraserve.sim.outcome import SimSettings
from loraserve.sim.policies import Policy


class SimPlanner:
    """Computes plans and rolls them out to the simulated engines."""

    def __init__(
        self,
        policy: Policy,
        adapters: Mapping[str, AdapterRef],
        engines: Mapping[str, SimEngine],
        timeline: Timeline,
        settings: SimSettings,
        publish: Callable[[Plan, float], None],
    ) -> None:
        """Create a planner without a plan. It calls ``publish`` with each plan that takes effect."""
        self._policy = policy
        self._adapters = adapters
        self._engines = engines
        self._timeline = timeline
        self._prepare_timeout_s = PlannerConfig().prepare_timeout_s
        self._plan_settings = PlanSettings(slo_ttft_s=settings.slo_ttft_s, interval_s=settings.plan_interval_s)
        self._publish = publish
        self._rollout = Rollout()
        self._is_rolling_out = False
        self._moves = 0

    def update(self, loads: Sequence[EngineLoad], now: float) -> None:
        self._deliver(events.EnginesSeen(tuple(loads), self._adapters), now)

    def plan(self, demand: Sequence[AdapterDemand], loads: Sequence[EngineLoad], cost: CostModel, now: float) -> None:
        """Make a plan and start its roll-out, unless a roll-out is under way or nothing would change."""
        if self._is_rolling_out:
            return
        plan = self._rollout.plan
        current = plan.placements if plan.epoch else recover_placements(loads, self._adapters)
        placements = self._policy.place(
            PlanInput(
                demand=demand,
                adapters=self._adapters,
                engines=[self._engines[load.engine].capabilities for load in loads],
                current=current,
                cost=cost,
                settings=self._plan_settings,
            )
        )
        moves = diff(current, placements)
        if not moves and plan.epoch and not shares_differ(current, placements):
            return
        self._moves += sum(bool(move.target) for move in moves)
        self._is_rolling_out = True
        self._deliver(events.Begin(placements, self._adapters, frozenset(), now), now)

    def record_prepared(self, engine: str, epoch: int, failed: Mapping[str, str], now: float) -> None:
        self._deliver(events.PrepareAnswered(engine, INCARNATION, epoch, failed), now)

    def take_moves(self) -> int:
        """Return the number of copies that new plans have added or moved since the last call."""
        moves, self._moves = self._moves, 0
        return moves

    def _deliver(self, event: events.Event, now: float) -> None:
        for instruction in self._rollout.handle(event, now):
            self._carry_out(instruction, now)

    def _carry_out(self, instruction: events.Instruction, now: float) -> None:
        # Call engines through the timeline, because an engine may be handling an event now.
        match instruction:
            case events.Prepare(engine, epoch, adapters):
                requested = CopiesRequested(epoch, adapters)
                self._timeline.schedule(now, lambda at: self._engines[engine].deliver(requested, at))
                timeout = events.PrepareFailed(engine, epoch, "it did not answer in time")
                self._timeline.schedule(now + self._prepare_timeout_s, lambda at: self._deliver(timeout, at))
            case events.Write(plan):
                self._deliver(events.Written(plan.epoch), now)
            case events.Publish(plan):
                self._publish(plan, now)
            case events.Retire(engine, epoch, keep):
                self._timeline.schedule(now, lambda at: self._retire(engine, epoch, keep, at))
            case events.RolloutEnded():
                self._is_rolling_out = False
            case events.Replan():
                pass

    def _retire(self, engine: str, epoch: int, keep: tuple[str, ...], now: float) -> None:
        self._engines[engine].deliver(CopiesRetired(epoch, keep), now)
        self._deliver(events.RetireEnded(engine, epoch), now)
