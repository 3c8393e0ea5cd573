"""The planner with scripted engines, in virtual time."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

import pytest

from loraserve.bus.protocol import Envelope
from loraserve.messages import (
    AdapterRef,
    EngineSeen,
    GetPlan,
    Plan,
    Prepared,
    PreparePlan,
    Rebalance,
    RebalanceDone,
    RetireCopies,
    RetireDone,
    ToEngine,
    ToRouter,
)
from loraserve.testing.clock import run_virtual
from loraserve.testing.peers import Peer, serving
from loraserve.testing.planner_stage import ADAPTERS, PlannerStage
from loraserve.testing.reports import engine_seen, resident


class Stage(PlannerStage):
    """The planner, two scripted engines, a router and an operator. ``history`` lists what happened, in order."""

    adapters = ADAPTERS

    def __init__(self, data_dir: Path, **settings: Any) -> None:
        super().__init__(data_dir, prepare_timeout_s=60.0, **settings)
        self.planner = self.new_planner()
        self.history: list[tuple[str, str, Any]] = []
        self.failing: dict[str, dict[str, str]] = {"e0": {}, "e1": {}}
        self.engines = {name: Peer(self.network, name, ToEngine, self._engine(name)) for name in self.failing}
        self.router = self.network.bus("router", ToRouter)
        self.router.subscribe("planner", "plan")
        self.plans: list[Plan] = []
        self._listening = asyncio.create_task(self._listen())

    def _engine(self, name: str) -> Callable[[Any], Any]:
        def script(message: Any) -> Any:
            match message:
                case PreparePlan(epoch=epoch, adapters=adapters):
                    self.history.append(("prepare", name, {a.version for a in adapters}))
                    failed = {v: why for v, why in self.failing[name].items() if v in {a.version for a in adapters}}
                    return Prepared(engine=name, incarnation="i1", epoch=epoch, failed=failed)
                case RetireCopies(epoch=epoch, keep=keep):
                    self.history.append(("retire", name, set(keep)))
                    return RetireDone(epoch=epoch, unpinned=0)

        return script

    async def _listen(self) -> None:
        while True:
            envelope: Envelope = await self.router.receive()
            plan: Plan = envelope.message
            if not self.plans or self.plans[-1] != plan:
                self.plans.append(plan)
                self.history.append(("publish", "router", self.copies(plan)))

    async def send_registry(self, adapters: Iterable[AdapterRef] = ADAPTERS) -> None:
        self.publish_registry(adapters)
        await asyncio.sleep(0.01)

    async def send_loads(self, *loads: EngineSeen, asked: Iterable[AdapterRef] = ADAPTERS) -> None:
        """Publish reports of both engines, with equal demand for the adapters."""
        self.publish_load(loads or [engine_seen(name) for name in self.engines], asked)
        await asyncio.sleep(0.01)

    def holding(self, plan: Plan) -> list[EngineSeen]:
        """Return reports of engines that hold the copies of the plan."""
        refs = {adapter.version: adapter for adapter in ADAPTERS}
        held = {
            e: [resident(refs[p.version], pinned=True) for p in plan.placements if p.engine == e] for e in ("e0", "e1")
        }
        return [engine_seen(name, resident=tuple(adapters)) for name, adapters in held.items()]

    @staticmethod
    def copies(plan: Plan) -> set[tuple[str, str]]:
        """Return (engine, version) of all copies."""
        return {(p.engine, p.version) for p in plan.placements}

    async def rebalance(self, dry_run: bool = False) -> RebalanceDone:
        done: RebalanceDone = await self.ask(Rebalance(dry_run=dry_run))
        return done

    async def plan(self) -> Plan:
        plan: Plan = await self.ask(GetPlan(), Plan, 1.0)
        return plan


Scenario = Callable[[Stage], Coroutine[Any, Any, None]]


@pytest.fixture
def play(tmp_path: Path) -> Callable[..., None]:
    """Return a function that runs a scenario; a second run restarts everything but the disk."""

    def play(scenario: Scenario, informed: bool = True, **settings: Any) -> None:
        async def main() -> None:
            stage = Stage(tmp_path, **settings)
            async with serving(stage.planner):
                await asyncio.sleep(0.01)
                if informed:
                    await stage.send_registry()
                    await stage.send_loads()
                await scenario(stage)

        run_virtual(main())

    return play
