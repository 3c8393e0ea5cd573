"""The planner process: a plan every interval or on demand, rolled out make-before-break."""

import asyncio
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from loraserve.bus.protocol import Bus, Envelope
from loraserve.clock import Clock
from loraserve.config import Config
from loraserve.cost.profile import starting_cost
from loraserve.errors import PeerError, RequestTimeout
from loraserve.messages import (
    AdapterRef,
    ClusterLoad,
    EngineLoad,
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
from loraserve.planner.diff import diff
from loraserve.planner.epochs import Epochs
from loraserve.planner.placement import plan as make_plan
from loraserve.planner.settings import PlanSettings
from loraserve.service import Service

REPUBLISH_S = 2.0
RETIRE_TIMEOUT_S = 5.0


class PlannerService(Service):
    """Prepares copies, then publishes the epoch, then retires what it no longer wants; one roll-out at a time."""

    inbox = ToPlanner

    def __init__(self, config: Config, bus: Bus, clock: Clock) -> None:
        super().__init__(config, bus, clock)
        self._epochs = Epochs(Path(config.cluster.data_dir) / "planner")
        self._plan = Plan(epoch=0, created_unix_s=0.0, placements=())
        self._load: ClusterLoad | None = None
        self._adapters: dict[str, AdapterRef] = {}
        self._registry_known = False
        self._rollout = asyncio.Lock()
        self._cost = starting_cost(config)

    async def start(self, stack: AsyncExitStack) -> None:
        self._plan = self._epochs.read() or self._plan
        self.log.info("plan_read", epoch=self._plan.epoch, copies=len(self._plan.placements))
        self.bus.subscribe("monitor", "load")
        self.bus.subscribe("store", "registry")

    def loops(self) -> list[Coroutine[Any, Any, None]]:
        return [self._plan_every_interval(), self._republish()]

    def ready_detail(self) -> str:
        return f"epoch {self._plan.epoch}, {len(self._plan.placements)} copies"

    async def handle(self, envelope: Envelope) -> None:
        match envelope.message:
            case ClusterLoad() as load:
                self._load = load
                for engine in self._engines():
                    self._cost = self._cost.observe(engine)
            case RegistryChanged(adapters=adapters):
                self._adapters = {adapter.version: adapter for adapter in adapters}
                self._registry_known = True
            case GetPlan():
                self.bus.respond(envelope, self._plan)
            case Rebalance(dry_run=dry_run):
                self.spawn(self._answer_rebalance(envelope, dry_run))

    async def _answer_rebalance(self, envelope: Envelope, dry_run: bool) -> None:
        self.bus.respond(envelope, await self._rebalance(dry_run))

    async def _plan_every_interval(self) -> None:
        while True:
            await asyncio.sleep(self.config.planner.interval_s)
            await self._rebalance(dry_run=False)

    async def _republish(self) -> None:
        while True:
            self.bus.publish("plan", self._plan)
            await asyncio.sleep(REPUBLISH_S)

    async def _rebalance(self, dry_run: bool) -> RebalanceDone:
        async with self._rollout:
            unknown = self._unknown()
            if unknown:
                return RebalanceDone(plan=self._plan, moves=(), applied=False, message=unknown, failed=(unknown,))
            engines = self._engines()
            demand = self._load.demand if self._load else ()
            placements = make_plan(demand, self._adapters, engines, self._plan.placements, self._cost, self._settings())
            moves = tuple(diff(self._plan.placements, placements, self._adapters))
            if dry_run:
                return RebalanceDone(plan=self._next(placements), moves=moves, applied=False, message="dry run")
            if not (moves or self._lost_copies()):
                text = "the plan is right as it is"
                return RebalanceDone(plan=self._plan, moves=(), applied=False, message=text)
            before = self._plan
            failed = tuple(await self._roll_out(placements))
            done = tuple(diff(before.placements, self._plan.placements, self._adapters))
            applied = self._plan is not before
            return RebalanceDone(plan=self._plan, moves=done, applied=applied, message="; ".join(failed), failed=failed)

    def _settings(self) -> PlanSettings:
        planner = self.config.planner
        return PlanSettings(min_copies=planner.min_copies, interval_s=planner.interval_s, pins=planner.pins)

    def _unknown(self) -> str:
        """What is missing to plan with, in words; "" where nothing is."""
        if not self._engines():
            return "no engine is ready"
        # A planner that has just started would take every adapter of its plan for unregistered.
        return "" if self._registry_known else "the store has not told yet which adapters there are; ask again"

    async def _roll_out(self, placements: tuple[Placement, ...]) -> list[str]:
        """Prepare, write, publish, retire. What could not be done, and why, is the answer.

        Copies that could not be prepared are left out. A plan that cannot be written is not published: the old one
        stays, and engines retire what they prepared for the new.
        """
        epoch = self._plan.epoch + 1
        by_engine = _by_engine(placements, self._adapters)
        answers = await asyncio.gather(*(self._prepare(e, epoch, refs) for e, refs in sorted(by_engine.items())))
        missing = {copy: reason for answer in answers for copy, reason in answer.items()}
        failed = [f"{engine}: {reason}" for (engine, _), reason in sorted(missing.items())]
        ready = [p for p in placements if (p.engine, p.version) not in missing]
        plan = self._next(_with_shares(ready))
        try:
            self._epochs.write(plan)
        except OSError as error:
            self.log.error("plan_not_written", epoch=epoch, reason=str(error))
            failed.append(f"epoch {epoch} could not be written, epoch {self._plan.epoch} stays: {error}")
        else:
            self._plan = plan
            self.bus.publish("plan", plan)
            self.log.info("plan_published", epoch=epoch, copies=len(ready), left_out=len(missing))
        await asyncio.gather(*(self._retire(load.engine, self._plan.epoch) for load in self._engines()))
        return failed

    async def _prepare(self, engine: str, epoch: int, adapters: list[AdapterRef]) -> dict[tuple[str, str], str]:
        """Copies that the engine does not have in the end, with the reason."""
        timeout_s = self.config.planner.prepare_timeout_s
        try:
            message = PreparePlan(epoch=epoch, adapters=tuple(adapters))
            answer = await self.bus.request(engine, message, Prepared, timeout_s)
        except (RequestTimeout, PeerError) as error:
            self.log.warning("engine_not_prepared", engine=engine, epoch=epoch, reason=str(error))
            return {(engine, adapter.version): str(error) for adapter in adapters}
        return {(engine, version): reason for version, reason in answer.failed.items()}

    async def _retire(self, engine: str, epoch: int) -> None:
        keep = tuple(p.version for p in self._plan.placements if p.engine == engine)
        try:
            await self.bus.request(engine, RetireCopies(epoch=epoch, keep=keep), RetireDone, RETIRE_TIMEOUT_S)
        except (RequestTimeout, PeerError) as error:
            # Its pins cost memory, not correctness, and the next roll-out retires them.
            self.log.warning("engine_not_retired", engine=engine, epoch=epoch, reason=str(error))

    def _engines(self) -> list[EngineLoad]:
        seen = self._load.engines if self._load else ()
        return [s.load for s in seen if s.alive and s.load.state == "READY"]

    def _lost_copies(self) -> bool:
        """An engine that restarted has nothing of what the plan says it has."""
        held = {load.engine: {a.version for a in load.resident if a.pinned} for load in self._engines()}
        return any(p.version not in held.get(p.engine, set()) for p in self._plan.placements)

    def _next(self, placements: tuple[Placement, ...]) -> Plan:
        return Plan(epoch=self._plan.epoch + 1, created_unix_s=self.clock.unix_s(), placements=placements)


def _by_engine(placements: tuple[Placement, ...], adapters: dict[str, AdapterRef]) -> dict[str, list[AdapterRef]]:
    engines: dict[str, list[AdapterRef]] = {}
    for placement in sorted(placements, key=lambda p: p.version):
        engines.setdefault(placement.engine, []).append(adapters[placement.version])
    return engines


def _with_shares(placements: list[Placement]) -> tuple[Placement, ...]:
    """Shares of the copies that are there sum to 1 again."""
    copies: dict[str, int] = {}
    for placement in placements:
        copies[placement.version] = copies.get(placement.version, 0) + 1
    return tuple(
        Placement(version=p.version, name=p.name, engine=p.engine, share=1 / copies[p.version]) for p in placements
    )
