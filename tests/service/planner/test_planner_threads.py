"""The planner answers messages while it plans and while it writes to disk. These tests run in real time."""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from loraserve.messages import (
    Drain,
    GetPlan,
    Ping,
    Placement,
    Plan,
    Pong,
    Prepared,
    PreparePlan,
    Rebalance,
    RebalanceDone,
    RetireCopies,
    RetireDone,
    ToEngine,
)
from loraserve.planner.placement import ours
from loraserve.planner.placement.problem import PlanInput
from loraserve.planner.plan_files import PlanFiles
from loraserve.testing.peers import Peer, serving
from loraserve.testing.planner_stage import ADAPTERS, PlannerStage
from loraserve.testing.reports import engine_seen

ENGINES = ("engine-0", "engine-1")
ANSWER_S = 0.25
"""Time for an answer, on a busy machine too."""
LATEST_S = 20.0


class Gate:
    """Stops a thread until the test opens it."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()

    def enter(self) -> None:
        self.entered.set()
        assert self.opened.wait(LATEST_S), "the test never opened the gate"

    async def wait_entered(self) -> None:
        deadline = time.monotonic() + LATEST_S
        while not self.entered.is_set():
            assert time.monotonic() < deadline, "no thread reached the gate"
            await asyncio.sleep(0.005)


class GatedPolicy:
    """The default policy behind a gate."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def __call__(self, inputs: PlanInput) -> tuple[Placement, ...]:
        self._gate.enter()
        return ours.plan(inputs)


class SlowDisk(PlanFiles):
    """Files whose plan, or whose drained engines, reach the disk only when the gate is open."""

    def __init__(self, folder: Path, gate: Gate, slow_write: str) -> None:
        super().__init__(folder)
        self._gate, self._slow_write = gate, slow_write

    def write_plan(self, plan: Plan) -> None:
        if self._slow_write == "plan":
            self._gate.enter()
        super().write_plan(plan)

    def write_drained(self, engines: Any) -> None:
        if self._slow_write == "drained":
            self._gate.enter()
        super().write_drained(engines)


class Cluster(PlannerStage):
    """A planner, two engines that do what they are asked, and an operator."""

    def __init__(self, data_dir: Path, **planner: Any) -> None:
        super().__init__(data_dir)
        self.planner = self.new_planner(**planner)
        self.engines = [Peer(self.network, name, ToEngine, self._engine(name)) for name in ENGINES]

    @staticmethod
    def _engine(name: str) -> Callable[[Any], Any]:
        def answer(message: Any) -> Any:
            match message:
                case PreparePlan(epoch=epoch):
                    return Prepared(engine=name, incarnation="i1", epoch=epoch, failed={})
                case RetireCopies(epoch=epoch):
                    return RetireDone(epoch=epoch, unpinned=0)

        return answer

    async def report(self) -> None:
        self.publish_registry()
        self.publish_load([engine_seen(name) for name in ENGINES])
        await asyncio.sleep(0.05)

    async def ask(self, message: Any, answer: type[Any] = RebalanceDone, timeout_s: float = LATEST_S) -> Any:
        return await super().ask(message, answer, timeout_s)

    async def check_responsive(self) -> None:
        """Check that requests are answered at once while reports arrive."""
        for _ in range(4):
            await self.report()
            assert await self.ask(Ping(), Pong, ANSWER_S)
            assert await self.ask(GetPlan(), Plan, ANSWER_S)


def run(scenario: Callable[[Cluster], Coroutine[Any, Any, None]], data_dir: Path, **planner: Any) -> None:
    async def main() -> None:
        cluster = Cluster(data_dir, **planner)
        async with serving(cluster.planner):
            await asyncio.sleep(0.05)
            await cluster.report()
            await scenario(cluster)

    asyncio.run(main())


def test_messages_are_answered_while_a_plan_is_computed(tmp_path: Path) -> None:
    gate = Gate()

    async def scenario(cluster: Cluster) -> None:
        asking = asyncio.create_task(cluster.ask(Rebalance()))
        await gate.wait_entered()
        await cluster.check_responsive()
        assert not asking.done()
        gate.opened.set()
        assert (await asking).applied

    run(scenario, tmp_path, policy=GatedPolicy(gate))


@pytest.mark.parametrize("slow_write", ["plan", "drained"])
def test_messages_are_answered_while_the_disk_is_slow(tmp_path: Path, slow_write: str) -> None:
    gate = Gate()

    async def scenario(cluster: Cluster) -> None:
        asking = asyncio.create_task(cluster.ask(Drain(engine="engine-0", on=True)))
        await gate.wait_entered()
        await cluster.check_responsive()
        assert not asking.done()
        gate.opened.set()
        done = await asking
        assert (done.applied, done.plan.drained) == (True, ("engine-0",))

    run(scenario, tmp_path, files=SlowDisk(tmp_path / "planner", gate, slow_write))


def test_a_plan_is_published_only_when_it_is_on_disk(tmp_path: Path) -> None:
    gate = Gate()
    files = SlowDisk(tmp_path / "planner", gate, "plan")

    async def scenario(cluster: Cluster) -> None:
        asking = asyncio.create_task(cluster.ask(Rebalance()))
        await gate.wait_entered()
        await cluster.check_responsive()
        assert (await cluster.ask(GetPlan(), Plan, ANSWER_S)).epoch == 0
        assert not any(engine.got(RetireCopies) for engine in cluster.engines), "pins of the new plan must stay"
        gate.opened.set()
        done = await asking
        assert files.read_plan() == done.plan

    run(scenario, tmp_path, files=files)


def test_a_drain_replaces_a_plan_that_is_being_computed(tmp_path: Path) -> None:
    gate = Gate()

    async def scenario(cluster: Cluster) -> None:
        first = asyncio.create_task(cluster.ask(Rebalance()))
        await gate.wait_entered()
        drain = asyncio.create_task(cluster.ask(Drain(engine="engine-0", on=True)))
        await cluster.check_responsive()
        gate.opened.set()
        given_up, done = await first, await drain
        assert not given_up.applied
        assert "given up for a newer one" in given_up.failed[0]
        assert (done.applied, done.plan.drained) == (True, ("engine-0",))
        assert {p.engine for p in done.plan.placements} == {"engine-1"}
        assert all(not request.adapters for request in cluster.engines[0].got(PreparePlan)), "it got no copies"

    run(scenario, tmp_path, policy=GatedPolicy(gate))


def test_drains_at_the_same_time_are_all_remembered(tmp_path: Path) -> None:
    gate = Gate()
    files = SlowDisk(tmp_path / "planner", gate, "drained")

    async def scenario(cluster: Cluster) -> None:
        asking = [asyncio.create_task(cluster.ask(Drain(engine=name, on=True))) for name in ENGINES]
        await gate.wait_entered()
        await asyncio.sleep(0.05)
        gate.opened.set()
        await asyncio.gather(*asking)
        assert files.read_drained() == frozenset(ENGINES)
        assert (await cluster.ask(Rebalance(dry_run=True))).plan.drained == ENGINES

    run(scenario, tmp_path, files=files)


def test_a_stopped_planner_does_not_leave_half_a_plan(tmp_path: Path) -> None:
    gate = Gate()
    files = SlowDisk(tmp_path / "planner", gate, "plan")

    async def scenario(cluster: Cluster) -> None:
        asking = asyncio.create_task(cluster.ask(Rebalance()))
        await gate.wait_entered()
        asking.cancel()
        cluster.planner.stop()
        await asyncio.sleep(0.05)
        gate.opened.set()

    run(scenario, tmp_path, files=files)
    written = files.read_plan()
    assert written is not None, "the thread ends its write before the process ends"
    assert {p.version for p in written.placements} == {a.version for a in ADAPTERS}
    assert sorted(f.name for f in (tmp_path / "planner").iterdir()) == ["plan.json"]


def test_a_rebalance_that_comes_while_a_plan_is_computed_waits_for_it(tmp_path: Path) -> None:
    gate = Gate()

    async def scenario(cluster: Cluster) -> None:
        first = asyncio.create_task(cluster.ask(Rebalance()))
        await gate.wait_entered()
        second = asyncio.create_task(cluster.ask(Rebalance()))
        await cluster.check_responsive()
        gate.opened.set()
        answers = await asyncio.gather(first, second)
        assert [answer.applied for answer in answers] == [True, False]
        assert answers[1].message == "the plan is right as it is"

    run(scenario, tmp_path, policy=GatedPolicy(gate))
