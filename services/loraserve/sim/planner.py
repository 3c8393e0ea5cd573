"""The planner of a simulation: the policy's placement, rolled out by the live state machine. Pure.

A plan is written at once; engines answer when they have loaded, or are given up after the live planner's timeout.
"""

from collections.abc import Callable, Mapping, Sequence

from loraserve.cost import CostModel
from loraserve.messages import AdapterDemand, AdapterRef, EngineLoad, Plan
from loraserve.planner.placement.moves import diff
from loraserve.planner.placement.problem import PlanInput, PlanSettings
from loraserve.planner.rollout import events
from loraserve.planner.rollout.copies import recovered, shares_moved
from loraserve.planner.rollout.machine import Rollout
from loraserve.sim.engine import SimEngine, Timeline
from loraserve.sim.policies import Policy

NO_PLAN = Plan(epoch=0, created_unix_s=0.0, placements=())
INCARNATION = "simulated"


class SimPlanner:
    """``moves``: copies that plans brought somewhere since they were last taken."""

    def __init__(
        self,
        policy: Policy,
        adapters: Mapping[str, AdapterRef],
        engines: Mapping[str, SimEngine],
        timeline: Timeline,
        settings: PlanSettings,
        prepare_timeout_s: float,
        published: Callable[[Plan, float], None],
    ) -> None:
        self._policy = policy
        self._adapters = adapters
        self._engines = engines
        self._timeline = timeline
        self._settings = settings
        self._prepare_timeout_s = prepare_timeout_s
        self._published = published
        self._rollout = Rollout(NO_PLAN)
        self._busy = False
        self.moves = 0

    def see(self, loads: Sequence[EngineLoad], now: float) -> None:
        """Reports of all engines."""
        self._tell(events.EnginesSeen(tuple(loads), self._adapters), now)

    def plan(self, demand: Sequence[AdapterDemand], loads: Sequence[EngineLoad], cost: CostModel, now: float) -> None:
        """For the next interval; not while the last plan is still being prepared."""
        if self._busy:
            return
        plan = self._rollout.plan
        current = plan.placements if plan.epoch else recovered(loads, self._adapters)
        inputs = PlanInput(
            demand=demand,
            adapters=self._adapters,
            engines=loads,
            current=current,
            cost=cost,
            settings=self._settings,
        )
        placements = self._policy.place(inputs)
        moves = diff(current, placements)
        if not moves and plan.epoch and not shares_moved(current, placements):
            return
        self.moves += sum(bool(move.target) for move in moves)
        self._busy = True
        self._tell(events.Begin(placements, self._adapters, frozenset(), now), now)

    def prepared(self, engine: str, epoch: int, failed: Mapping[str, str], now: float) -> None:
        """An engine's answer."""
        self._tell(events.PrepareAnswered(engine, INCARNATION, epoch, failed), now)

    def take_moves(self) -> int:
        taken, self.moves = self.moves, 0
        return taken

    def _tell(self, event: events.Event, now: float) -> None:
        for instruction in self._rollout.handle(event, now):
            self._carry_out(instruction, now)

    def _carry_out(self, instruction: events.Instruction, now: float) -> None:
        """What engines do comes after what is happening now: they may be in the middle of an event of theirs."""
        match instruction:
            case events.Prepare(engine, epoch, adapters):
                self._timeline.at(now, lambda at: self._engines[engine].prepare(epoch, adapters, at))
                silent = events.PrepareFailed(engine, epoch, "it did not answer in time")
                self._timeline.at(now + self._prepare_timeout_s, lambda at: self._tell(silent, at))
            case events.Write(plan):
                self._tell(events.Written(plan.epoch), now)
            case events.Publish(plan):
                self._published(plan, now)
            case events.Retire(engine, epoch, keep):
                self._timeline.at(now, lambda at: self._retire(engine, epoch, keep, at))
            case events.Ended():
                self._busy = False
            case events.Replan():
                pass

    def _retire(self, engine: str, epoch: int, keep: tuple[str, ...], now: float) -> None:
        self._engines[engine].retire(epoch, keep, now)
        self._tell(events.RetireEnded(engine, epoch), now)
