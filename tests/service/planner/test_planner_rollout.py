"""Roll-outs with engines that keep pins; the planner, an engine or the router is killed in each phase."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from loraserve.errors import ConfigError, PeerError
from loraserve.messages import (
    AdapterRef,
    Drain,
    GetPlan,
    Plan,
    Prepared,
    PreparePlan,
    Rebalance,
    RetireCopies,
    RetireDone,
    ToEngine,
    ToRouter,
)
from loraserve.planner.rollout.copies import versions_by_engine
from loraserve.service import ServiceState
from loraserve.testing.clock import run_virtual
from loraserve.testing.memory_bus import Fault, MemoryNetwork
from loraserve.testing.peers import Peer
from loraserve.testing.planner_stage import ADAPTERS, PlannerStage
from loraserve.testing.reports import engine_seen, picture, resident

ENGINES = ("engine-0", "engine-1")
SOON_S = 12.0
"""Time until all processes are back and hold what the plan says; the planner's interval is much longer."""
PHASES = {
    "prepare": lambda m: isinstance(m, PreparePlan) and bool(m.adapters),
    "prepared": lambda m: isinstance(m, Prepared),
    "publish": lambda m: isinstance(m, Plan) and m.drained == ("engine-0",),
    "retire": lambda m: isinstance(m, RetireCopies),
}
"""The messages of a roll-out in order; the one of the phase is lost with the process that dies."""


class Holder:
    """An engine reduced to what it pins and for which epoch."""

    def __init__(self, network: MemoryNetwork, name: str, incarnation: str) -> None:
        self.name, self.incarnation = name, incarnation
        self.pins: dict[str, tuple[AdapterRef, int]] = {}
        self.plan_epoch = 0
        self.peer = Peer(network, name, ToEngine, self.script)

    def script(self, message: Any) -> Any:
        self.plan_epoch = max(self.plan_epoch, message.epoch)
        match message:
            case PreparePlan(epoch=epoch, adapters=adapters):
                self.pins |= {adapter.version: (adapter, epoch) for adapter in adapters}
                return Prepared(engine=self.name, incarnation=self.incarnation, epoch=epoch, failed={})
            case RetireCopies(epoch=epoch, keep=keep):
                self.pins = {v: p for v, p in self.pins.items() if v in keep or p[1] > epoch}
                return RetireDone(epoch=epoch, unpinned=0)

    def report(self) -> Any:
        held = tuple(resident(adapter, pinned=True) for adapter, _ in self.pins.values())
        return engine_seen(self.name, incarnation=self.incarnation, resident=held, plan_epoch=self.plan_epoch)


class Cluster(PlannerStage):
    """All processes but the gateway, which can be killed and restarted. Reports are sent in the background."""

    def __init__(self, data_dir: Path, **settings: Any) -> None:
        super().__init__(data_dir, self._fault, **settings)
        self.strike: Callable[[Any], bool] | None = None
        self.struck = asyncio.Event()
        self.victim = ""
        self.registered = ADAPTERS
        self.holders = {name: Holder(self.network, name, "i1") for name in ENGINES}
        self.dead: set[str] = set()
        self.plans: list[Plan] = []
        self.lives = 1
        self.tasks = {"report": asyncio.create_task(self._report())}
        self.start_router()
        self.start_planner()

    def _fault(self, sender: str, receiver: str, message: Any) -> Fault | None:
        if self.strike is None or not self.strike(message):
            return None
        self.strike = None
        asyncio.get_running_loop().call_soon(self.kill, self.victim)
        self.struck.set()
        return Fault(copies=0) if self.victim in (sender, receiver) else None

    async def _report(self) -> None:
        while True:
            self.publish_load([holder.report() for holder in self.holders.values()], self.registered, self.dead)
            self.publish_registry(self.registered)
            await asyncio.sleep(0.25)

    def start_planner(self) -> None:
        self.planner = self.new_planner()
        self.tasks["planner"] = asyncio.create_task(self.planner.run())

    def start_router(self) -> None:
        """Start a router without a plan."""
        self.plan_at_router: Plan | None = None
        self.router = self.network.bus("router", ToRouter)
        self.router.subscribe("planner", "plan")
        self.tasks["router"] = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        while True:
            plan: Plan = (await self.router.receive()).message
            if plan != self.plan_at_router:
                self.plan_at_router = plan
                self.plans.append(plan)
                self.check_held(plan)

    def check_held(self, plan: Plan) -> None:
        """Check that engines hold all copies of a published plan (make-before-break)."""
        for engine, versions in versions_by_engine(plan.placements).items():
            assert engine in self.dead or versions <= self.holders[engine].pins.keys(), f"{engine} lacks copies"

    def kill(self, name: str) -> None:
        if name in self.tasks:
            self.tasks[name].cancel()
        self.network.kill(name)
        if name in self.holders:
            self.dead.add(name)

    def start(self, name: str) -> None:
        match name:
            case "planner":
                self.start_planner()
            case "router":
                self.start_router()
            case _:
                self.lives += 1
                self.holders[name] = Holder(self.network, name, f"i{self.lives}")
                self.dead.discard(name)

    async def until_ready(self) -> None:
        while self.planner.state is not ServiceState.READY:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)

    def is_settled(self) -> bool:
        """Return whether every engine holds exactly the copies of the router's plan."""
        plan = self.plan_at_router
        if plan is None:
            return False
        planned = versions_by_engine(plan.placements)
        return all(set(h.pins) == planned.get(h.name, set()) for h in self.holders.values())

    async def wait_settled(self) -> Plan:
        async with asyncio.timeout(SOON_S):
            while not self.is_settled():  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        plan: Plan = await self.ask(GetPlan(), Plan)
        assert plan == self.plan_at_router
        return plan

    async def stop(self) -> None:
        self.planner.stop()
        await asyncio.gather(self.tasks["planner"], return_exceptions=True)
        for task in self.tasks.values():
            task.cancel()


def versions(plan: Plan) -> set[str]:
    return {placement.version for placement in plan.placements}


Scenario = Callable[[Cluster], Coroutine[Any, Any, None]]


@pytest.fixture
def play(tmp_path: Path) -> Callable[..., None]:
    def play(scenario: Scenario, **settings: Any) -> None:
        async def main() -> None:
            cluster = Cluster(tmp_path, **settings)
            await cluster.until_ready()
            try:
                await scenario(cluster)
            finally:
                await cluster.stop()

        run_virtual(main())

    return play


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("victim", ["planner", "engine-0", "engine-1", "router"])
def test_the_last_complete_epoch_is_served_when_any_process_dies_in_any_phase(play, victim: str, phase: str) -> None:
    async def scenario(cluster: Cluster) -> None:
        first = (await cluster.ask(Rebalance())).plan
        assert versions_by_engine(first.placements).keys() == set(ENGINES)
        cluster.victim, cluster.strike = victim, PHASES[phase]
        draining = asyncio.create_task(cluster.ask(Drain(engine="engine-0", on=True)))
        await cluster.struck.wait()
        await asyncio.sleep(0.4)
        served = cluster.plans[-1]
        assert served.epoch >= first.epoch
        assert versions(served) == versions(first), "an adapter lost its last copy"
        if victim != "router":
            cluster.check_held(served)
        cluster.start(victim)
        draining.add_done_callback(lambda task: task.cancelled() or task.exception())
        after = await cluster.wait_settled()
        assert versions(after) == versions(first)
        assert after.epoch >= served.epoch
        # The drain is on disk, so it is completed whichever process died.
        async with asyncio.timeout(cluster.config.planner.prepare_timeout_s + SOON_S):
            while cluster.holders["engine-0"].pins or cluster.plans[-1].drained != ("engine-0",):  # noqa: ASYNC110
                await asyncio.sleep(0.5)
        assert versions(await cluster.wait_settled()) == versions(first)
        with suppress(Exception):
            await draining

    play(scenario)


def test_a_planner_that_lost_its_disk_continues_from_what_engines_hold(play, tmp_path: Path) -> None:
    async def scenario(cluster: Cluster) -> None:
        for _ in range(2):
            await cluster.ask(Drain(engine="engine-0", on=True))
            first = (await cluster.ask(Drain(engine="engine-0", on=False))).plan
        cluster.kill("planner")
        for name in ("plan.json", "drained.json"):
            (tmp_path / "planner" / name).write_bytes(b'{"type":"Plan","epo')
        held = {name: set(holder.pins) for name, holder in cluster.holders.items()}
        cluster.start("planner")
        await cluster.until_ready()
        await asyncio.sleep(5.0)
        assert {name: set(holder.pins) for name, holder in cluster.holders.items()} == held
        assert cluster.plan_at_router == first, "an empty plan is not published"
        done = await cluster.ask(Rebalance())
        assert (done.applied, done.moves) == (True, ()), "nothing has to move"
        assert done.plan.epoch > first.epoch
        assert (tmp_path / "planner" / "plan.unreadable").exists()
        await cluster.wait_settled()

    play(scenario)


def test_a_restarted_engine_soon_holds_its_copies_again(play) -> None:
    async def scenario(cluster: Cluster) -> None:
        plan = (await cluster.ask(Rebalance())).plan
        cluster.kill("engine-1")
        await asyncio.sleep(2.0)
        cluster.start("engine-1")
        assert not cluster.is_settled()
        await asyncio.sleep(0.5)
        assert cluster.is_settled()
        assert (await cluster.wait_settled()) == plan, "it is the same epoch"

    play(scenario)


def test_a_restarted_monitor_does_not_make_the_planner_forget_engines(play) -> None:
    """Its first publications name only the engines that have reported to it already."""

    async def scenario(cluster: Cluster) -> None:
        plan = (await cluster.ask(Rebalance())).plan
        cluster.tasks["report"].cancel()
        cluster.monitor.publish("load", picture(cluster.holders["engine-0"].report(), incarnation="m2"))
        await asyncio.sleep(0.1)
        dry = await cluster.ask(Rebalance(dry_run=True))
        assert versions_by_engine(dry.plan.placements) == versions_by_engine(plan.placements)

    play(scenario)


def test_copies_that_the_lost_store_cannot_supply_stay_where_they_are(play) -> None:
    async def scenario(cluster: Cluster) -> None:
        cluster.registered = ADAPTERS[:2]
        await asyncio.sleep(0.5)
        first = (await cluster.ask(Rebalance())).plan
        target = cluster.holders["engine-1"]
        new = versions(first) - target.pins.keys()
        gone = "unreachable: store did not answer"
        script = target.script

        def without_store(message: Any) -> Any:
            if not isinstance(message, PreparePlan):
                return script(message)
            failed = {a.version: gone for a in message.adapters if a.version not in target.pins}
            return Prepared(engine=target.name, incarnation="i1", epoch=message.epoch, failed=failed)

        target.peer.script = without_store
        done = await cluster.ask(Drain(engine="engine-0", on=True))
        assert done.failed == tuple(f"engine-1: {gone}" for _ in new)
        assert done.plan.drained == ("engine-0",)
        assert versions_by_engine(done.plan.placements) == versions_by_engine(first.placements), (
            "copies that could not move stayed"
        )
        target.peer.script = script
        again = await cluster.ask(Rebalance())
        assert versions_by_engine(again.plan.placements) == {"engine-1": versions(first)}
        await cluster.wait_settled()

    play(scenario)


def test_a_drained_engine_stays_empty_over_restarts_until_it_is_used_again(play) -> None:
    async def scenario(cluster: Cluster) -> None:
        await cluster.ask(Rebalance())
        done = await cluster.ask(Drain(engine="engine-0", on=True))
        assert (done.applied, done.failed, done.plan.drained) == (True, (), ("engine-0",))
        assert not cluster.holders["engine-0"].pins
        again = await cluster.ask(Drain(engine="engine-0", on=True))
        assert (again.applied, again.message) == (False, "the plan is right as it is")
        for name in ("planner", "engine-0"):
            cluster.kill(name)
            cluster.start(name)
            await cluster.until_ready()
            assert (await cluster.ask(Rebalance())).plan.drained == ("engine-0",)
        assert "drained: engine-0" in cluster.planner.ready_detail()
        assert not cluster.holders["engine-0"].pins
        back = await cluster.ask(Drain(engine="engine-0", on=False))
        assert (back.plan.drained, back.failed) == ((), ())
        await cluster.wait_settled()

    play(scenario)


def test_the_last_engine_keeps_serving_after_its_drain_and_the_answer_has_a_warning(play) -> None:
    async def scenario(cluster: Cluster) -> None:
        await cluster.ask(Drain(engine="engine-0", on=True))
        done = await cluster.ask(Drain(engine="engine-1", on=True))
        assert done.plan.drained == ENGINES
        assert versions(done.plan) == {a.version for a in ADAPTERS}
        assert done.failed == ("only drained engines are ready (engine-0, engine-1); they serve until another is",)

    play(scenario)


def test_a_drain_does_not_wait_for_a_plan_that_is_being_prepared(play) -> None:
    async def scenario(cluster: Cluster) -> None:
        cluster.registered = ADAPTERS[:2]
        await asyncio.sleep(0.5)
        await cluster.ask(Rebalance())
        cluster.registered = ADAPTERS
        cluster.holders["engine-0"].peer.script = lambda message: None
        await asyncio.sleep(0.5)
        slow = asyncio.create_task(cluster.ask(Rebalance()))
        await asyncio.sleep(1.0)
        begun_s = asyncio.get_running_loop().time()
        done = await cluster.ask(Drain(engine="engine-0", on=True))
        assert asyncio.get_running_loop().time() - begun_s < 10.0
        assert versions_by_engine(done.plan.placements) == {"engine-1": {a.version for a in ADAPTERS}}
        assert (await slow).failed == ("epoch 2 was given up for a newer plan",)

    play(scenario)


def test_draining_an_unknown_engine_is_refused_and_names_the_known_ones(play) -> None:
    async def scenario(cluster: Cluster) -> None:
        with pytest.raises(PeerError, match=r"there is no engine engine-7; there are engine-0, engine-1") as refused:
            await cluster.ask(Drain(engine="engine-7", on=True))
        assert refused.value.code == "unknown_engine"

    play(scenario)


def test_a_drain_that_cannot_be_written_is_refused(play, tmp_path: Path) -> None:
    async def scenario(cluster: Cluster) -> None:
        (tmp_path / "planner").write_text("in the way")
        done = await cluster.ask(Drain(engine="engine-0", on=True))
        assert not done.applied
        assert "could not be written" in done.failed[0]
        (tmp_path / "planner").unlink()
        assert (await cluster.ask(Rebalance())).plan.drained == ()

    play(scenario)


def test_a_pin_to_an_engine_that_does_not_exist_stops_the_planner_and_is_named(tmp_path: Path) -> None:
    async def main() -> None:
        planner = PlannerStage(tmp_path, pins={"legal": ("engine-2",)}).new_planner()
        with pytest.raises(ConfigError, match=r"planner\.pins\.legal.*'engine-2'.*engine-0, engine-1"):
            await planner.run()

    run_virtual(main())


def test_a_pin_of_an_unregistered_adapter_is_logged_once(play, capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario(cluster: Cluster) -> None:
        await asyncio.sleep(5.0)
        assert (await cluster.ask(Rebalance())).applied

    play(scenario, pins={"legal": ("engine-0",), ADAPTERS[0].name: ("engine-0",)})
    told = [line for line in capsys.readouterr().out.splitlines() if "pin_waits" in line]
    assert len(told) == 1
    assert "planner.pins.legal" in told[0]
