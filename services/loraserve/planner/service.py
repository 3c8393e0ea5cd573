"""The planner process: a plan every interval or on demand, rolled out make-before-break.

What a roll-out does next is decided in rollout.py; here its instructions are carried out.
"""

import asyncio
from collections import defaultdict
from collections.abc import Coroutine, Mapping
from contextlib import AsyncExitStack, suppress
from math import inf
from pathlib import Path
from typing import Any

from loraserve.bus.protocol import Bus, Envelope
from loraserve.clock import Clock
from loraserve.config import Config, check_pins, engine_names
from loraserve.cost import CostLearner
from loraserve.cost.profile import initial_cost_model
from loraserve.errors import PeerError, RequestTimeoutError
from loraserve.messages import (
    AdapterDemand,
    AdapterRef,
    ClusterLoad,
    Drain,
    GetPlan,
    Placement,
    Plan,
    Prepared,
    PreparePlan,
    Rebalance,
    RebalanceDone,
    RegistryChanged,
    RetireCopies,
    RetireDone,
    ToPlanner,
)
from loraserve.planner.cluster_state import EngineBook
from loraserve.planner.placement.moves import diff, explain_moves
from loraserve.planner.placement.policies import PLACEMENT_POLICIES
from loraserve.planner.placement.problem import PlanInput, PlanSettings
from loraserve.planner.plan_files import Epochs
from loraserve.planner.rollout import events
from loraserve.planner.rollout.copies import recovered, shares_moved
from loraserve.planner.rollout.machine import Rollout
from loraserve.service import Service
from loraserve.story import Story, StoryEntry

REPUBLISH_S = 2.0
RETIRE_TIMEOUT_S = 5.0
DRAIN_RETRY_S = 5.0
"""Until a drain that could not be rolled out is tried again."""
NO_PLAN = Plan(epoch=0, created_unix_s=0.0, placements=())


class PlannerService(Service):
    """One roll-out at a time; a drain does not wait for one that is being prepared, it takes its place."""

    inbox = ToPlanner

    def __init__(self, config: Config, bus: Bus, clock: Clock) -> None:
        super().__init__(config, bus, clock)
        self._epochs = Epochs(Path(config.cluster.data_dir) / "planner")
        self._rollout = Rollout(NO_PLAN)
        self._drained: frozenset[str] = frozenset()
        self._engines = EngineBook()
        self._demand: tuple[AdapterDemand, ...] = ()
        self._adapters: dict[str, AdapterRef] = {}
        self._registry_known = False
        self._unknown_pins: set[str] = set()
        self._one_at_a_time = asyncio.Lock()
        self._due = asyncio.Event()
        self._ended: dict[int, asyncio.Future[events.Ended]] = {}
        self._learner = CostLearner(initial_cost_model(config))
        self._story = Story()
        self._published: Mapping[str, str] = {}
        """Where the last published plan has copies of each version, for the story."""

    async def start(self, stack: AsyncExitStack) -> None:
        """Raises ConfigError where a pin names an engine that does not exist."""
        check_pins(self.config)
        self._rollout = Rollout(self._epochs.read() or NO_PLAN)
        self._drained = self._epochs.read_drained()
        plan = self._rollout.plan
        self.log.info("plan_read", epoch=plan.epoch, copies=len(plan.placements), drained=sorted(self._drained))
        self.bus.subscribe("monitor", "load")
        self.bus.subscribe("store", "registry")

    def loops(self) -> list[Coroutine[Any, Any, None]]:
        return [self._plan_every_interval(), self._republish()]

    def ready_detail(self) -> str:
        plan = self._rollout.plan
        drained = f", drained: {', '.join(sorted(self._drained))}" if self._drained else ""
        return f"epoch {plan.epoch}, {len(plan.placements)} copies{drained}"

    def story_entries(self, subject: str) -> list[StoryEntry]:
        return self._story.entries(subject)

    async def handle(self, envelope: Envelope) -> None:
        match envelope.message:
            case ClusterLoad() as load:
                self._take_load(load)
            case RegistryChanged(adapters=adapters):
                self._take_registry(adapters)
            case GetPlan():
                self.bus.respond(envelope, self._rollout.plan)
            case Rebalance(dry_run=dry_run):
                self.spawn(self._answer(envelope, self._rebalance(dry_run)))
            case Drain(engine=engine, on=on):
                # Not behind a roll-out that is being prepared: it takes its place.
                self.spawn(self._answer(envelope, self._drain(engine, on)))

    async def _answer(self, envelope: Envelope, work: Coroutine[Any, Any, RebalanceDone]) -> None:
        self.bus.respond(envelope, await work)

    def _take_load(self, load: ClusterLoad) -> None:
        self._engines.update(load, self.clock.monotonic_s())
        self._demand = load.demand
        self._learner.learn(self._engines.ready(), self._engines.names())
        self._tell(events.EnginesSeen(tuple(self._engines.ready()), self._adapters))

    def _take_registry(self, adapters: tuple[AdapterRef, ...]) -> None:
        self._adapters = {adapter.version: adapter for adapter in adapters}
        self._registry_known = True
        unknown = self.config.planner.pins.keys() - {adapter.name for adapter in adapters}
        if unknown != self._unknown_pins:
            self._unknown_pins = unknown
            for name in sorted(unknown):
                self.log.warning("pin_waits", field=f"planner.pins.{name}", reason="no adapter of this name is loaded")

    async def _plan_every_interval(self) -> None:
        while True:
            wait_s = min(self.config.planner.interval_s, DRAIN_RETRY_S if self._drain_is_open() else inf)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._due.wait(), wait_s)
            self._due.clear()
            await self._rebalance(dry_run=False)

    async def _republish(self) -> None:
        while True:
            # Where there is none, on disk neither, routers keep what they have.
            if self._rollout.plan.epoch:
                self.bus.publish("plan", self._rollout.plan)
            await asyncio.sleep(REPUBLISH_S)

    async def _drain(self, engine: str, on: bool) -> RebalanceDone:
        names = {*engine_names(self.config), *self._engines.names(), *self._drained}
        if engine not in names:
            raise PeerError("unknown_engine", f"there is no engine {engine}; there are {', '.join(sorted(names))}")
        drained = self._drained | {engine} if on else self._drained - {engine}
        if drained != self._drained:
            try:
                self._epochs.write_drained(drained)
            except OSError as error:
                text = f"which engines are drained could not be written, and stays as it was: {error}"
                return self._nothing_done(text, failed=True)
            self._drained = drained
            self.log.info("drain", engine=engine, on=on, drained=sorted(drained))
            self._tell(events.GiveUp())
        done = await self._rebalance(dry_run=False)
        if self._drain_is_open():
            self._due.set()
        return done

    def _drain_is_open(self) -> bool:
        """Not rolled out yet: a planner may have died over it, or the disk was full."""
        return self._drained != frozenset(self._rollout.plan.drained)

    async def _rebalance(self, dry_run: bool) -> RebalanceDone:
        async with self._one_at_a_time:
            unknown = self._unknown()
            if unknown:
                return self._nothing_done(unknown, failed=True)
            before = self._current()
            inputs, problem = self._plan_input(before)
            placements = PLACEMENT_POLICIES[self.config.planner.policy](inputs)
            failed = (problem,) if problem else ()
            if dry_run:
                moves = tuple(explain_moves(inputs, placements, diff(before, placements)))
                plan = Plan(
                    epoch=self._rollout.epoch + 1,
                    created_unix_s=self.clock.unix_s(),
                    placements=placements,
                    drained=tuple(sorted(self._drained)),
                )
                return RebalanceDone(plan=plan, moves=moves, applied=False, message="dry run", failed=failed)
            if not self._has_to_change(placements):
                done = self._nothing_done("the plan is right as it is")
                return RebalanceDone(plan=done.plan, moves=(), applied=False, message=done.message, failed=failed)
            ended = await self._roll_out(placements)
            failed = (*failed, *ended.failed)
            plan = self._rollout.plan
            made = diff(before, plan.placements) if ended.applied else []
            explained = tuple(explain_moves(inputs, plan.placements, made))
            text = "; ".join(failed)
            return RebalanceDone(plan=plan, moves=explained, applied=ended.applied, message=text, failed=failed)

    def _nothing_done(self, message: str, failed: bool = False) -> RebalanceDone:
        problems = (message,) if failed else ()
        return RebalanceDone(plan=self._rollout.plan, moves=(), applied=False, message=message, failed=problems)

    def _unknown(self) -> str:
        """What is missing to plan with, in words; "" where nothing is."""
        if not self._engines.ready():
            return "no engine is ready"
        # A planner that has just started would take every adapter of its plan for unregistered.
        return "" if self._registry_known else "the store has not told yet which adapters there are; ask again"

    def _current(self) -> tuple[Placement, ...]:
        """What is in force; where the plan was lost, what engines still hold of it."""
        plan = self._rollout.plan
        return plan.placements if plan.epoch else recovered(self._engines.ready(), self._adapters)

    def _plan_input(self, current: tuple[Placement, ...]) -> tuple[PlanInput, str]:
        """Return what to plan from, and what is wrong with it in words."""
        ready = self._engines.ready()
        engines, drained, problem = [e for e in ready if e.engine not in self._drained], self._drained, ""
        if not engines:
            names = ", ".join(load.engine for load in ready)
            problem = f"only drained engines are ready ({names}); they serve until another is"
            engines, drained = ready, frozenset()
        inputs = PlanInput(
            demand=self._demand,
            adapters=self._adapters,
            engines=engines,
            current=current,
            cost=self._learner.cost,
            settings=self._settings(drained),
        )
        return inputs, problem

    def _settings(self, drained: frozenset[str]) -> PlanSettings:
        planner = self.config.planner
        return PlanSettings(
            min_copies=planner.min_copies,
            slo_ttft_s=self.config.router.slo_ttft_s,
            interval_s=planner.interval_s,
            pins=planner.pins,
            drained=drained,
        )

    def _has_to_change(self, placements: tuple[Placement, ...]) -> bool:
        plan = self._rollout.plan
        before = {(p.engine, p.version) for p in plan.placements}
        return (
            before != {(p.engine, p.version) for p in placements}
            or self._drained != frozenset(plan.drained)
            or shares_moved(plan.placements, placements)
            or self._rollout.lacks(self.clock.monotonic_s())
        )

    async def _roll_out(self, placements: tuple[Placement, ...]) -> events.Ended:
        begin = events.Begin(placements, self._adapters, self._drained, self.clock.unix_s())
        epoch = self._rollout.epoch + 1
        ended: asyncio.Future[events.Ended] = asyncio.get_running_loop().create_future()
        self._ended[epoch] = ended
        self._tell(begin)
        try:
            return await ended
        finally:
            del self._ended[epoch]

    def _tell(self, event: events.Event) -> None:
        """One event to the roll-out, its instructions to the world."""
        for instruction in self._rollout.handle(event, self.clock.monotonic_s()):
            self._carry_out(instruction)

    def _carry_out(self, instruction: events.Instruction) -> None:
        match instruction:
            case events.Prepare():
                self.spawn(self._prepare(instruction))
            case events.Write(plan):
                self._tell(self._write(plan))
            case events.Publish(plan):
                self.bus.publish("plan", plan)
                self._note_copies(plan)
                self.log.info("plan_published", epoch=plan.epoch, copies=len(plan.placements), drained=plan.drained)
            case events.Retire():
                self.spawn(self._retire(instruction))
            case events.Ended(epoch, applied, failed):
                self.log.info("roll_out_ended", epoch=epoch, applied=applied, failed=failed)
                if epoch in self._ended and not self._ended[epoch].done():
                    self._ended[epoch].set_result(instruction)
            case events.Replan(engine):
                self.log.info("engine_is_back", engine=engine)
                self._due.set()

    def _note_copies(self, plan: Plan) -> None:
        """Add an entry for each adapter whose copies or shares differ from the plan published before."""
        copies: dict[str, list[str]] = defaultdict(list)
        for placement in plan.placements:
            copies[placement.version].append(f"{placement.engine} ({placement.share:.0%} of its requests)")
        placed = {version: ", ".join(sorted(engines)) for version, engines in copies.items()}
        now = self.clock.monotonic_s()
        for version in placed.keys() | self._published.keys():
            before, after = self._published.get(version), placed.get(version)
            if before != after:
                self._story.tell(version, now, f"plan epoch {plan.epoch}: copies on {after or 'no engine'}")
        self._published = placed

    def _write(self, plan: Plan) -> events.Written | events.WriteFailed:
        try:
            self._epochs.write(plan)
        except OSError as error:
            self.log.error("plan_not_written", epoch=plan.epoch, reason=str(error))
            return events.WriteFailed(plan.epoch, str(error))
        return events.Written(plan.epoch)

    async def _prepare(self, asked: events.Prepare) -> None:
        message = PreparePlan(epoch=asked.epoch, adapters=asked.adapters)
        timeout_s = self.config.planner.prepare_timeout_s
        try:
            answer = await self.bus.request(asked.engine, message, Prepared, timeout_s)
        except (RequestTimeoutError, PeerError) as error:
            self.log.warning("engine_not_prepared", engine=asked.engine, epoch=asked.epoch, reason=str(error))
            self._tell(events.PrepareFailed(asked.engine, asked.epoch, str(error)))
            return
        if answer.failed:
            self.log.warning("copies_not_prepared", engine=asked.engine, epoch=asked.epoch, failed=answer.failed)
        self._tell(events.PrepareAnswered(asked.engine, answer.incarnation, answer.epoch, answer.failed))

    async def _retire(self, asked: events.Retire) -> None:
        message = RetireCopies(epoch=asked.epoch, keep=asked.keep)
        try:
            await self.bus.request(asked.engine, message, RetireDone, RETIRE_TIMEOUT_S)
        except (RequestTimeoutError, PeerError) as error:
            self.log.warning("engine_not_retired", engine=asked.engine, epoch=asked.epoch, reason=str(error))
        self._tell(events.RetireEnded(asked.engine, asked.epoch))
