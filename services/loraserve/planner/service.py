"""The planner process makes a plan every interval or on request, and rolls it out make-before-break.

``rollout/machine.py`` decides the next step of a roll-out. This module carries out its instructions. Planning and disk
writes run in threads, so that the planner still answers messages.
"""

import asyncio
from collections.abc import Coroutine
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
from loraserve.planner.cluster_reports import ClusterReports
from loraserve.planner.placement import PLACEMENT_POLICIES
from loraserve.planner.placement.moves import explain_moves
from loraserve.planner.placement.problem import PlacementPolicy, PlanInput, PlanSettings
from loraserve.planner.plan_files import PlanFiles
from loraserve.planner.rollout import events
from loraserve.planner.rollout.copies import copy_id, recover_placements, shares_differ
from loraserve.planner.rollout.machine import NO_PLAN, Rollout
from loraserve.service import Service

REPUBLISH_S = 2.0
RETIRE_TIMEOUT_S = 5.0
DRAIN_RETRY_S = 5.0
"""Seconds before the planner retries a drain that it could not roll out."""


class PlannerService(Service):
    """Makes and rolls out one plan at a time. A change of the drained engines cancels a plan that is being prepared.

    Tests pass ``files`` and ``policy``. By default the configuration determines them.
    """

    inbox = ToPlanner

    def __init__(
        self,
        config: Config,
        bus: Bus,
        clock: Clock,
        *,
        files: PlanFiles | None = None,
        policy: PlacementPolicy | None = None,
    ) -> None:
        super().__init__(config, bus, clock)
        self._files = files or PlanFiles(Path(config.cluster.data_dir) / "planner")
        self._policy = policy or PLACEMENT_POLICIES[config.planner.policy]
        self._rollout = Rollout()
        self._reports = ClusterReports()
        self._learner = CostLearner(initial_cost_model(config))
        self._drained: frozenset[str] = frozenset()
        self._unknown_pins: set[str] = set()
        self._planning = asyncio.Lock()
        self._draining = asyncio.Lock()
        self._plan_now = asyncio.Event()
        self._ends: dict[int, asyncio.Future[events.RolloutEnded]] = {}
        """By epoch, the future that completes when the roll-out ends."""

    async def start(self, stack: AsyncExitStack) -> None:
        """Read plan and drained engines from disk. Raises ConfigError if a pin names an engine that does not exist."""
        check_pins(self.config)
        self._rollout = Rollout(self._files.read_plan() or NO_PLAN)
        self.story = self._rollout.story
        self._drained = self._files.read_drained()
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

    async def handle(self, envelope: Envelope) -> None:
        match envelope.message:
            case ClusterLoad() as load:
                self._take_load(load)
            case RegistryChanged(adapters=adapters):
                self._take_registry(adapters)
            case GetPlan():
                self.bus.respond(envelope, self._rollout.plan)
            case Rebalance(dry_run=dry_run):
                self.spawn(self._respond(envelope, self._rebalance(dry_run)))
            case Drain(engine=engine, on=on):
                self.spawn(self._respond(envelope, self._drain(engine, on)))

    async def _respond(self, envelope: Envelope, work: Coroutine[Any, Any, RebalanceDone]) -> None:
        self.bus.respond(envelope, await work)

    def _take_load(self, load: ClusterLoad) -> None:
        self._reports.take_load(load, self.clock.monotonic_s())
        engines = self._reports.ready_engines()
        self._learner.learn(engines, self._reports.engine_names())
        self._handle_event(events.EnginesSeen(tuple(engines), self._reports.adapters))

    def _take_registry(self, adapters: tuple[AdapterRef, ...]) -> None:
        self._reports.take_registry(adapters)
        unknown = self.config.planner.pins.keys() - {adapter.name for adapter in adapters}
        if unknown != self._unknown_pins:
            self._unknown_pins = unknown
            for name in sorted(unknown):
                reason = "no adapter of this name is registered"
                self.log.warning("pin_waits", field=f"planner.pins.{name}", reason=reason)

    async def _plan_every_interval(self) -> None:
        while True:
            wait_s = min(self.config.planner.interval_s, DRAIN_RETRY_S if self._drain_is_pending() else inf)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._plan_now.wait(), wait_s)
            self._plan_now.clear()
            await self._rebalance(dry_run=False)

    async def _republish(self) -> None:
        while True:
            # Epoch 0 means that no plan was found on disk. Routers then keep their last plan.
            if self._rollout.plan.epoch:
                self.bus.publish("plan", self._rollout.plan)
            await asyncio.sleep(REPUBLISH_S)

    async def _drain(self, engine: str, on: bool) -> RebalanceDone:
        names = {*engine_names(self.config), *self._reports.engine_names(), *self._drained}
        if engine not in names:
            raise PeerError("unknown_engine", f"there is no engine {engine}; there are {', '.join(sorted(names))}")
        async with self._draining:
            drained = self._drained | {engine} if on else self._drained - {engine}
            if drained != self._drained:
                try:
                    await asyncio.to_thread(self._files.write_drained, drained)
                except OSError as error:
                    text = f"the drained engines could not be written to disk and stay as they were: {error}"
                    return self._not_applied(text, failed=(text,))
                self._drained = drained
                self.log.info("drain", engine=engine, on=on, drained=sorted(drained))
                self._handle_event(events.Cancel())
        done = await self._rebalance(dry_run=False)
        if self._drain_is_pending():
            self._plan_now.set()
        return done

    def _drain_is_pending(self) -> bool:
        """Return whether the engines drained now differ from the drained engines of the plan in force."""
        return self._drained != frozenset(self._rollout.plan.drained)

    async def _rebalance(self, dry_run: bool) -> RebalanceDone:
        async with self._planning:
            missing = self._reports.missing()
            if missing:
                return self._not_applied(missing, failed=(missing,))
            drained = self._drained
            inputs, problem = self._reports.plan_input(self._placements(), self._learner.cost, self._settings(drained))
            failed = (problem,) if problem else ()
            placements = await asyncio.to_thread(self._policy, inputs)
            if dry_run:
                moves = await asyncio.to_thread(explain_moves, inputs, placements)
                plan = Plan(
                    epoch=self._rollout.epoch + 1,
                    created_unix_s=self.clock.unix_s(),
                    placements=placements,
                    drained=tuple(sorted(drained)),
                )
                return RebalanceDone(plan=plan, moves=moves, applied=False, message="dry run", failed=failed)
            if drained != self._drained:
                # The Drain request that changed the drained engines waits for the lock and then makes a new plan.
                text = "the plan was given up for a newer one, because the drained engines changed"
                return self._not_applied(text, failed=(text,))
            if not self._differs(placements):
                return self._not_applied("the plan is right as it is", failed)
            ended = await self._roll_out(placements, inputs)
            plan, failed = self._rollout.plan, (*failed, *ended.failed)
            moves = await asyncio.to_thread(explain_moves, inputs, plan.placements) if ended.applied else ()
            return RebalanceDone(
                plan=plan, moves=moves, applied=ended.applied, message="; ".join(failed), failed=failed
            )

    def _not_applied(self, message: str, failed: tuple[str, ...] = ()) -> RebalanceDone:
        return RebalanceDone(plan=self._rollout.plan, moves=(), applied=False, message=message, failed=failed)

    def _placements(self) -> tuple[Placement, ...]:
        """Return the placements in force. If the plan was lost, return the pinned copies of the ready engines."""
        plan = self._rollout.plan
        if plan.epoch:
            return plan.placements
        return recover_placements(self._reports.ready_engines(), self._reports.adapters)

    def _settings(self, drained: frozenset[str]) -> PlanSettings:
        planner = self.config.planner
        return PlanSettings(
            min_copies=planner.min_copies,
            slo_ttft_s=self.config.router.slo_ttft_s,
            interval_s=planner.interval_s,
            pins=planner.pins,
            drained=drained,
        )

    def _differs(self, placements: tuple[Placement, ...]) -> bool:
        """Return whether a roll-out is needed to bring these placements into force."""
        plan = self._rollout.plan
        return (
            set(map(copy_id, plan.placements)) != set(map(copy_id, placements))
            or self._drain_is_pending()
            or shares_differ(plan.placements, placements)
            or self._rollout.lacks_copies(self.clock.monotonic_s())
        )

    async def _roll_out(self, placements: tuple[Placement, ...], inputs: PlanInput) -> events.RolloutEnded:
        begin = events.Begin(placements, inputs.adapters, self._drained, self.clock.unix_s())
        epoch = self._rollout.epoch + 1
        end: asyncio.Future[events.RolloutEnded] = asyncio.get_running_loop().create_future()
        self._ends[epoch] = end
        self._handle_event(begin)
        try:
            return await end
        finally:
            del self._ends[epoch]

    def _handle_event(self, event: events.Event) -> None:
        for instruction in self._rollout.handle(event, self.clock.monotonic_s()):
            self._carry_out(instruction)

    def _carry_out(self, instruction: events.Instruction) -> None:
        match instruction:
            case events.Prepare():
                self.spawn(self._prepare(instruction))
            case events.Write(plan):
                # The roll-out waits for the result of the write, so an unexpected error must end the process.
                self.spawn_vital(self._write(plan))
            case events.Publish(plan):
                self.bus.publish("plan", plan)
                self.log.info("plan_published", epoch=plan.epoch, copies=len(plan.placements), drained=plan.drained)
            case events.Retire():
                self.spawn(self._retire(instruction))
            case events.RolloutEnded(epoch, applied, failed):
                self.log.info("roll_out_ended", epoch=epoch, applied=applied, failed=failed)
                if epoch in self._ends and not self._ends[epoch].done():
                    self._ends[epoch].set_result(instruction)
            case events.Replan(engine):
                self.log.info("engine_is_back", engine=engine)
                self._plan_now.set()

    async def _write(self, plan: Plan) -> None:
        try:
            await asyncio.to_thread(self._files.write_plan, plan)
        except OSError as error:
            self.log.error("plan_not_written", epoch=plan.epoch, reason=str(error))
            self._handle_event(events.WriteFailed(plan.epoch, str(error)))
        else:
            self._handle_event(events.Written(plan.epoch))

    async def _prepare(self, prepare: events.Prepare) -> None:
        message = PreparePlan(epoch=prepare.epoch, adapters=prepare.adapters)
        timeout_s = self.config.planner.prepare_timeout_s
        try:
            answer = await self.bus.request(prepare.engine, message, Prepared, timeout_s)
        except (RequestTimeoutError, PeerError) as error:
            self.log.warning("engine_not_prepared", engine=prepare.engine, epoch=prepare.epoch, reason=str(error))
            self._handle_event(events.PrepareFailed(prepare.engine, prepare.epoch, str(error)))
            return
        if answer.failed:
            self.log.warning("copies_not_prepared", engine=prepare.engine, epoch=prepare.epoch, failed=answer.failed)
        self._handle_event(events.PrepareAnswered(prepare.engine, answer.incarnation, answer.epoch, answer.failed))

    async def _retire(self, retire: events.Retire) -> None:
        message = RetireCopies(epoch=retire.epoch, keep=retire.keep)
        try:
            await self.bus.request(retire.engine, message, RetireDone, RETIRE_TIMEOUT_S)
        except (RequestTimeoutError, PeerError) as error:
            self.log.warning("engine_not_retired", engine=retire.engine, epoch=retire.epoch, reason=str(error))
        self._handle_event(events.RetireEnded(retire.engine, retire.epoch))
