"""The monitor with reporting engines and a listening router, in virtual time."""

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from itertools import pairwise
from typing import Any

import pytest

from loraserve.config import Config, MonitorConfig
from loraserve.messages import (
    PROTOCOL_VERSION,
    AdapterTokens,
    AnnounceCapabilities,
    ClusterLoad,
    ClusterStatistics,
    Copies,
    EngineCapabilities,
    EngineGone,
    EngineSeen,
    FindCopies,
    Ping,
    Pong,
    RegistryChanged,
    ToGateway,
    ToMonitor,
    ToRouter,
)
from loraserve.messages.transfer import Abilities
from loraserve.monitor.service import CONFIRM_S, MonitorService
from loraserve.testing.clock import LoopClock, run_virtual
from loraserve.testing.memory_bus import Fault, MemoryBus, MemoryNetwork
from loraserve.testing.peers import serving
from loraserve.testing.reports import adapter_ref, engine_seen, engine_statistics, resident

INTERVAL_S, DEAD_AFTER_S = 10.0, 1.5
"""The interval is long, so that immediate publications can be told from regular ones."""
REPORT_S = 0.25
REPORTS_PER_STATISTICS = 4
PIRATE = adapter_ref(1)


class Stage:
    """The monitor, engines that report regularly, and a router that records each publication and its time."""

    def __init__(self, interval_s: float = INTERVAL_S) -> None:
        self.network = MemoryNetwork()
        self.config = Config(
            monitor=MonitorConfig(publish_interval_s=interval_s, dead_after_s=DEAD_AFTER_S, window_s=60.0)
        )
        self.monitor = self.start_monitor()
        self.listener = self.network.bus("router", ToRouter)
        self.listener.subscribe("monitor", "load")
        self.pictures: list[tuple[float, ClusterLoad]] = []
        self.asked: list[str] = []
        self.reporting: dict[str, asyncio.Task[None]] = {}
        self.buses: dict[str, MemoryBus] = {}
        self.listening = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        while True:
            envelope = await self.listener.receive()
            self.pictures.append((self.now, envelope.message))

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def start_monitor(self) -> MonitorService:
        return MonitorService(self.config, self.network.bus("monitor", ToMonitor), LoopClock())

    def start_engine(self, name: str, tokens_per_s: float = 0.0, **changes: Any) -> None:
        if name not in self.buses:
            self.buses[name] = self.network.bus(name, Ping | AnnounceCapabilities)
        self.reporting[name] = asyncio.create_task(self._run_engine(name, tokens_per_s, engine_seen(name, **changes)))

    def silence(self, name: str) -> None:
        self.reporting.pop(name).cancel()

    async def _run_engine(self, name: str, tokens_per_s: float, seen: EngineSeen) -> None:
        bus = self.buses[name]
        bus.send("monitor", seen.capabilities)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._report(bus, seen, tokens_per_s))
            tasks.create_task(self._answer(bus, seen.capabilities))

    async def _report(self, bus: MemoryBus, seen: EngineSeen, tokens_per_s: float) -> None:
        began_s = self.now
        for number in itertools.count():
            bus.send("monitor", seen.load)
            if number % REPORTS_PER_STATISTICS == 0:
                done = int(tokens_per_s * (self.now - began_s))
                counted = AdapterTokens(version=PIRATE.version, prefill_tokens=0, decode_tokens=done)
                statistics = engine_statistics(
                    bus.name, incarnation=seen.load.incarnation, adapter_tokens=(counted,), steps=number
                )
                bus.send("monitor", statistics)
            await asyncio.sleep(REPORT_S)

    async def _answer(self, bus: MemoryBus, capabilities: EngineCapabilities) -> None:
        while True:
            envelope = await bus.receive()
            if isinstance(envelope.message, AnnounceCapabilities):
                self.asked.append(bus.name)
                bus.send("monitor", capabilities)
            else:
                pong = Pong(
                    name=bus.name, state="READY", incarnation=capabilities.incarnation, pid=1, protocol=PROTOCOL_VERSION
                )
                bus.respond(envelope, pong)

    async def picture_after(self, now: float, timeout_s: float = 30.0) -> tuple[float, ClusterLoad]:
        """Return the first publication after this time."""
        async with asyncio.timeout(timeout_s):
            while True:
                for at_s, picture in self.pictures:
                    if at_s > now:
                        return at_s, picture
                await asyncio.sleep(0.005)


def alive(picture: ClusterLoad) -> dict[str, bool]:
    return {seen.load.engine: seen.alive for seen in picture.engines}


def play(scenario: Callable[[Stage], Coroutine[Any, Any, None]], interval_s: float = INTERVAL_S) -> None:
    async def main() -> None:
        stage = Stage(interval_s)
        async with serving(stage.monitor):
            await asyncio.sleep(0.05)
            await scenario(stage)

    run_virtual(main())


def test_load_is_published_every_interval_and_numbered() -> None:
    async def scenario(stage: Stage) -> None:
        await asyncio.sleep(5.0)
        times = [at_s for at_s, _ in stage.pictures]
        assert len(times) >= 10
        assert all(later - at_s == pytest.approx(0.5, abs=0.01) for at_s, later in pairwise(times))
        assert [picture.sequence for _, picture in stage.pictures] == list(range(1, len(times) + 1))
        assert {picture.incarnation for _, picture in stage.pictures} == {stage.monitor.bus.incarnation}

    play(scenario, interval_s=0.5)


def test_a_new_engine_is_published_at_once() -> None:
    async def scenario(stage: Stage) -> None:
        came_s = stage.now
        stage.start_engine("e0", running=3)
        at_s, picture = await stage.picture_after(came_s - 0.001)
        assert at_s - came_s < 0.05
        assert alive(picture) == {"e0": True}
        assert picture.engines[0].load.queue.running == 3

    play(scenario)


def test_a_silent_engine_is_declared_dead_in_time_and_published_at_once() -> None:
    async def scenario(stage: Stage) -> None:
        for name in ("e0", "e1"):
            stage.start_engine(name)
        await asyncio.sleep(2.1)
        stage.silence("e0")
        last_report_s = 2.05
        deaths: list[float] = []
        while not deaths:
            await asyncio.sleep(0.01)
            deaths = [at_s for at_s, picture in stage.pictures if alive(picture) == {"e0": False, "e1": True}]
        assert deaths[0] - last_report_s == pytest.approx(DEAD_AFTER_S, abs=0.1)
        assert all(alive(p).get("e0", True) for at_s, p in stage.pictures if at_s < deaths[0])

    play(scenario)


def test_an_engine_that_reports_is_never_declared_dead() -> None:
    async def scenario(stage: Stage) -> None:
        stage.start_engine("e0")
        await asyncio.sleep(60.0)
        assert all(alive(picture) == {"e0": True} for at_s, picture in stage.pictures if at_s > 0.1)

    play(scenario)


def test_a_dead_engine_that_returns_is_published_at_once() -> None:
    async def scenario(stage: Stage) -> None:
        stage.start_engine("e0")
        await asyncio.sleep(1.0)
        stage.silence("e0")
        await asyncio.sleep(15.0)
        assert alive(stage.pictures[-1][1]) == {"e0": False}
        back_s = stage.now
        stage.start_engine("e0", incarnation="i2")
        at_s, picture = await stage.picture_after(back_s - 0.001)
        assert at_s - back_s < 0.05
        assert alive(picture) == {"e0": True}

    play(scenario)


@pytest.mark.parametrize("change", [{"incarnation": "i2"}, {"state": "DRAINING"}], ids=["restart", "drain"])
def test_a_restart_and_a_drain_are_published_at_once(change: dict[str, Any]) -> None:
    async def scenario(stage: Stage) -> None:
        stage.start_engine("e0")
        await asyncio.sleep(1.0)
        stage.silence("e0")
        changed_s = stage.now
        stage.start_engine("e0", **change)
        at_s, picture = await stage.picture_after(changed_s - 0.001)
        assert at_s - changed_s < 0.05
        for name, value in change.items():
            assert getattr(picture.engines[0].load, name) == value

    play(scenario)


def test_ordinary_reports_wait_for_the_interval() -> None:
    async def scenario(stage: Stage) -> None:
        stage.start_engine("e0")
        await asyncio.sleep(1.0)
        seen = len(stage.pictures)
        await asyncio.sleep(20.0)
        # The timer for the next dead engine also wakes the monitor, at most once per DEAD_AFTER_S - REPORT_S.
        assert len(stage.pictures) - seen <= 20.0 / (DEAD_AFTER_S - REPORT_S) + 2

    play(scenario)


def test_demand_has_names_from_the_registry() -> None:
    async def scenario(stage: Stage) -> None:
        store = stage.network.bus("store", Ping)
        store.publish("registry", RegistryChanged(revision=1, adapters=(PIRATE,)))
        stage.start_engine("e0", tokens_per_s=100.0)
        stage.start_engine("e1", tokens_per_s=50.0)
        await asyncio.sleep(30.0)
        (demand,) = stage.pictures[-1][1].demand
        assert (demand.version, demand.name, demand.rank) == (PIRATE.version, PIRATE.name, PIRATE.rank)
        assert demand.decode_tokens_per_s == pytest.approx(150.0, rel=0.1)
        assert demand.forecast_tokens_per_s == pytest.approx(150.0, rel=0.1)

    play(scenario, interval_s=0.5)


def test_the_number_of_live_engines_is_reported() -> None:
    async def scenario(stage: Stage) -> None:
        for name in ("e0", "e1"):
            stage.start_engine(name)
        await asyncio.sleep(1.0)
        stage.silence("e1")
        await asyncio.sleep(2.0)
        pong = await stage.listener.request("monitor", Ping(), Pong, 1.0)
        assert pong.detail == "1 engines alive"
        assert "loraserve_engines_alive 1.0" in stage.monitor.metrics.render().decode()

    play(scenario)


def test_the_answer_names_live_holders_and_dead_engines_are_published() -> None:
    async def scenario(stage: Stage) -> None:
        able = Abilities(protocol=1, host="h", neighbourhood="n", transports=("shm",), device="cpu")
        reader = stage.network.bus("engine-9", Ping | EngineGone)
        reader.subscribe("monitor", "gone")

        async def holders() -> list[tuple[str, str]]:
            found = await reader.request("monitor", FindCopies(version=PIRATE.version), Copies, 1.0)
            return [(each.engine, each.incarnation) for each in found.holders]

        stage.start_engine("e0", resident=(resident(PIRATE),), abilities=able)
        stage.start_engine("e1", resident=(resident(PIRATE),))
        await asyncio.sleep(0.1)
        assert await holders() == [("e0", "i1")]
        stage.silence("e0")
        assert (await reader.receive()).message == EngineGone(engine="e0", incarnation="i1")
        assert await holders() == []
        stage.start_engine("e0", resident=(resident(PIRATE),), abilities=able, incarnation="i2")
        await asyncio.sleep(0.1)
        assert await holders() == [("e0", "i2")]
        stage.silence("e0")
        stage.start_engine("e0", incarnation="i3")
        assert (await reader.receive()).message == EngineGone(engine="e0", incarnation="i2", ended=True)
        assert await holders() == []

    play(scenario)


def test_an_engine_whose_process_ends_is_dead_long_before_its_reports_are_late() -> None:
    async def scenario(stage: Stage) -> None:
        reader = stage.network.bus("engine-9", Ping | EngineGone)
        reader.subscribe("monitor", "gone")
        stage.start_engine("e0")
        stage.start_engine("e1")
        await asyncio.sleep(0.1)
        stage.silence("e0")
        stage.network.kill("e0")
        killed_s = stage.now
        assert (await reader.receive()).message == EngineGone(engine="e0", incarnation="i1", ended=True)
        at_s, picture = await stage.picture_after(killed_s - 0.001)
        assert alive(picture) == {"e0": False, "e1": True}
        assert at_s - killed_s < 2 * CONFIRM_S < DEAD_AFTER_S

    play(scenario)


def test_an_engine_that_only_lost_its_connection_stays_alive() -> None:
    async def scenario(stage: Stage) -> None:
        stage.start_engine("e0")
        await asyncio.sleep(0.1)
        stage.monitor.bus.lost("e0")  # type: ignore[attr-defined]
        await asyncio.sleep(2 * CONFIRM_S)
        assert (await stage.listener.request("monitor", Ping(), Pong, 1.0)).detail == "1 engines alive"

    play(scenario)


def test_an_engine_behind_a_slow_network_that_lost_its_connection_is_never_declared_dead() -> None:
    async def scenario(stage: Stage) -> None:
        stage.start_engine("e0")
        await asyncio.sleep(0.1)
        stage.network.faults = lambda sender, receiver, message: (
            Fault(delay_s=2 * CONFIRM_S) if isinstance(message, Ping) and sender == "monitor" else None
        )
        lost_s = stage.now
        stage.monitor.bus.lost("e0")  # type: ignore[attr-defined]
        await asyncio.sleep(5 * CONFIRM_S)
        later = [picture for at_s, picture in stage.pictures if at_s > lost_s]
        assert later
        assert all(alive(picture) == {"e0": True} for picture in later)

    play(scenario)


def test_a_restarted_monitor_asks_each_engine_for_its_capabilities() -> None:
    async def scenario(stage: Stage) -> None:
        stage.start_engine("e0", max_running=7)
        await asyncio.sleep(1.0)
        assert stage.asked == [], "the engine announced them when it started"
        stage.network.kill("monitor")
        async with serving(stage.start_monitor()):
            restarted_s = stage.now
            await asyncio.sleep(1.0)
            assert stage.asked == ["e0"], "asked once, since the answer arrived"
            at_s, picture = next(found for found in stage.pictures if found[0] > restarted_s and found[1].engines)
            assert at_s - restarted_s < 2 * REPORT_S
            assert picture.engines[0].capabilities.max_running == 7

    async def main() -> None:
        stage = Stage()
        running = asyncio.create_task(stage.monitor.run())
        await asyncio.sleep(0.05)
        await scenario(stage)
        await asyncio.gather(running, return_exceptions=True)

    run_virtual(main())


def test_capabilities_that_were_lost_are_asked_for_until_they_arrive() -> None:
    async def scenario(stage: Stage) -> None:
        lost = iter([True, True, True, False])

        def lose(sender: str, receiver: str, message: Any) -> Fault | None:
            return Fault(copies=0) if isinstance(message, EngineCapabilities) and next(lost) else None

        stage.network.faults = lose
        came_s = stage.now
        stage.start_engine("e0")
        await asyncio.sleep(2.0)
        assert stage.asked == ["e0"] * 3
        at_s, picture = next(found for found in stage.pictures if found[1].engines)
        assert alive(picture) == {"e0": True}
        assert at_s - came_s < 4 * REPORT_S

    play(scenario)


def test_a_new_incarnation_is_not_published_with_the_capabilities_of_the_last() -> None:
    async def scenario(stage: Stage) -> None:
        stage.start_engine("e0", kv_blocks=100)
        await asyncio.sleep(1.0)
        stage.silence("e0")
        lost = iter([True, False])

        def lose(sender: str, receiver: str, message: Any) -> Fault | None:
            return Fault(copies=0) if isinstance(message, EngineCapabilities) and next(lost) else None

        stage.network.faults = lose
        stage.start_engine("e0", incarnation="i2", kv_blocks=200)
        await asyncio.sleep(1.0)
        found = {
            (seen.load.incarnation, seen.capabilities.incarnation, seen.capabilities.kv_blocks)
            for _, picture in stage.pictures
            for seen in picture.engines
        }
        assert found == {("i1", "i1", 100), ("i2", "i2", 200)}

    play(scenario)


def test_counters_of_live_engines_are_published_every_statistics_interval() -> None:
    async def scenario(stage: Stage) -> None:
        gateway = stage.network.bus("gateway-0", ToGateway)
        gateway.subscribe("monitor", "statistics")
        for name in ("e0", "e1"):
            stage.start_engine(name)
        await asyncio.sleep(3.0)
        stage.silence("e1")
        await asyncio.sleep(5.0)
        published: list[ClusterStatistics] = []
        while gateway.arrived_messages:
            published.append((await gateway.receive()).message)
        assert len(published) == pytest.approx(8, abs=1)
        assert {name for each in published for name in each.engines} == {"e0", "e1"}
        assert set(published[-1].engines) == {"e0"}
        assert published[-1].engines["e0"].steps > published[2].engines["e0"].steps > 0

    play(scenario)
