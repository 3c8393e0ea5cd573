"""The life of a service: start, loops, drain and stop, and which errors end it."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

import pytest

from loraserve.bus.protocol import Envelope
from loraserve.config import Config
from loraserve.errors import AdapterError, PeerError, RequestTimeoutError
from loraserve.messages import Abort, GetPlan, ListAdapters, Ping, Pong, StoryLine, StoryTold, TellStory
from loraserve.service import Service, ServiceState
from loraserve.testing.clock import FakeClock, run_virtual
from loraserve.testing.memory_bus import MemoryBus, MemoryNetwork

TIMEOUT_S = 5.0


class Worker(Service):
    """Writes a diary. GetPlan raises in ``handle``, ListAdapters raises in spawned work, Abort is recorded."""

    inbox = Ping | TellStory | GetPlan | ListAdapters | Abort
    drain_timeout_s = 3.0

    def __init__(self, bus: MemoryBus) -> None:
        super().__init__(Config(), bus, FakeClock())
        self.diary: list[str] = []
        self.ready = True
        self.start_s = 0.0
        self.start_error: Exception | None = None
        self.drain_s = 0.0
        self.loop_error: Exception | None = None
        self.handle_error: Exception = ValueError("bad luck")

    async def start(self, stack: AsyncExitStack) -> None:
        stack.callback(self.diary.append, "closed")
        self.starting_detail = "warming up"
        await asyncio.sleep(self.start_s)
        if self.start_error:
            raise self.start_error
        self.diary.append("started")

    def loops(self) -> list[Coroutine[Any, Any, None]]:
        return [self._tick(), self._ends_early()]

    async def handle(self, envelope: Envelope) -> None:
        match envelope.message:
            case GetPlan():
                raise self.handle_error
            case ListAdapters():
                self.spawn(self._fail_later())
            case Abort(request_id=request_id):
                self.diary.append(f"abort {request_id} while {self.state}")

    async def drain(self) -> None:
        self.diary.append("draining")
        await asyncio.sleep(self.drain_s)
        self.diary.append("drained")

    def is_ready(self) -> bool:
        return self.ready

    def ready_detail(self) -> str:
        return "all well"

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            if self.loop_error:
                raise self.loop_error

    async def _ends_early(self) -> None:
        self.diary.append("looped")

    async def _fail_later(self) -> None:
        await asyncio.sleep(0.1)
        raise self.handle_error


class Stage:
    """One worker and a peer that sends it messages."""

    def __init__(self) -> None:
        network = MemoryNetwork()
        self.worker = Worker(network.bus("worker", Worker.inbox))
        self.peer = network.bus("peer", Ping)
        self.running: asyncio.Task[None] | None = None

    async def up(self) -> None:
        self.running = asyncio.create_task(self.worker.run())
        while self.worker.state is ServiceState.STARTING and not self.running.done():  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    async def down(self) -> None:
        self.worker.stop()
        assert self.running is not None
        await self.running

    async def ping(self) -> Pong:
        return await self.peer.request("worker", Ping(), Pong, TIMEOUT_S)


def play(scenario: Callable[[Stage], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        await scenario(Stage())

    run_virtual(main())


def test_the_hooks_run_in_order_from_start_to_stop() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.up()
        pong = await stage.ping()
        assert (pong.name, pong.state, pong.detail) == ("worker", "READY", "all well")
        assert pong.incarnation == stage.worker.bus.incarnation
        await stage.down()
        assert stage.worker.state is ServiceState.STOPPED
        assert stage.worker.diary == ["started", "looped", "draining", "drained", "closed"]

    play(scenario)


def test_a_story_has_wall_clock_times() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.up()
        for subject in ("r1", "r2"):
            stage.worker.story.tell(subject, stage.worker.clock.monotonic_s() - 2.0, f"{subject} arrived")
        answer = await stage.peer.request("worker", TellStory(subjects=("r1", "r2")), StoryTold, TIMEOUT_S)
        arrived_s = stage.worker.clock.unix_s() - 2.0
        assert answer.lines == tuple(
            StoryLine(unix_s=arrived_s, subject=subject, text=f"{subject} arrived") for subject in ("r1", "r2")
        )
        await stage.down()

    play(scenario)


def test_a_repeated_story_has_the_same_times() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.up()
        stage.worker.story.tell("r1", stage.worker.clock.monotonic_s(), "r1 arrived")
        request = TellStory(subjects=("r1",))
        first = await stage.peer.request("worker", request, StoryTold, TIMEOUT_S)
        stage.worker.clock = FakeClock(stage.worker.clock.monotonic_s(), stage.worker.clock.unix_s() + 0.001)
        assert await stage.peer.request("worker", request, StoryTold, TIMEOUT_S) == first
        await stage.down()

    play(scenario)


def test_a_starting_service_answers_pings_refuses_requests_and_keeps_other_messages() -> None:
    async def scenario(stage: Stage) -> None:
        stage.worker.start_s = 2.0
        stage.running = asyncio.create_task(stage.worker.run())
        await asyncio.sleep(0.1)
        pong = await stage.ping()
        assert (pong.state, pong.detail) == ("STARTING", "warming up")
        with pytest.raises(PeerError) as refused:
            await stage.peer.request("worker", GetPlan(), Pong, TIMEOUT_S)
        assert refused.value.code == "starting"
        for name in ("one", "two"):
            stage.peer.send("worker", Abort(request_id=name))
        await asyncio.sleep(2.0)
        stage.peer.send("worker", Abort(request_id="three"))
        await asyncio.sleep(0.1)
        kept = [entry.split(" while")[0] for entry in stage.worker.diary if entry.startswith("abort")]
        assert kept == ["abort one", "abort two", "abort three"]
        await stage.down()

    play(scenario)


def test_a_started_service_that_is_not_ready_reports_starting() -> None:
    async def scenario(stage: Stage) -> None:
        stage.worker.ready = False
        stage.running = asyncio.create_task(stage.worker.run())
        await asyncio.sleep(1)
        assert (await stage.ping()).state == "STARTING"
        stage.peer.send("worker", Abort(request_id="served"))
        stage.worker.ready = True
        pong = await stage.ping()
        assert (pong.state, pong.detail) == ("READY", "all well")
        assert stage.worker.diary == ["started", "looped", "abort served while READY"]
        await stage.down()

    play(scenario)


def test_stopping_cancels_a_start_and_closes_its_resources() -> None:
    async def scenario(stage: Stage) -> None:
        stage.worker.start_s = 3600.0
        stage.running = asyncio.create_task(stage.worker.run())
        await asyncio.sleep(1)
        await stage.down()
        assert stage.worker.diary == ["closed"]
        assert asyncio.get_running_loop().time() < 2

    play(scenario)


def test_stopping_before_running_starts_nothing() -> None:
    async def scenario(stage: Stage) -> None:
        stage.worker.stop()
        await stage.worker.run()
        assert stage.worker.diary == []

    play(scenario)


@pytest.mark.parametrize("error", [ValueError("no model"), TimeoutError("store")])
def test_a_failed_start_ends_the_run_with_its_error(error: Exception) -> None:
    async def scenario(stage: Stage) -> None:
        stage.worker.start_error = error
        with pytest.raises(type(error), match=str(error)):
            await stage.worker.run()
        assert stage.worker.diary == ["closed"]

    play(scenario)


def test_a_crashing_loop_ends_the_run_with_its_error() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.up()
        stage.worker.loop_error = ZeroDivisionError("tick")
        assert stage.running is not None
        with pytest.raises(ZeroDivisionError, match="tick"):
            await stage.running
        assert stage.worker.diary == ["started", "looped", "closed"]
        assert stage.worker.state is ServiceState.STOPPED

    play(scenario)


def test_vital_work_that_fails_ends_the_run_with_its_error() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.up()
        stage.worker.spawn_vital(stage.worker._fail_later())
        assert stage.running is not None
        with pytest.raises(ValueError, match="bad luck"):
            await stage.running
        stage.worker.spawn_vital(asyncio.sleep(1))

    play(scenario)


def test_a_crash_while_draining_ends_the_run_too() -> None:
    async def scenario(stage: Stage) -> None:
        stage.worker.drain_s = 2.0
        await stage.up()
        stage.worker.loop_error = ZeroDivisionError("tick")
        with pytest.raises(ZeroDivisionError):
            await stage.down()

    play(scenario)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ValueError("bad luck"), "internal", "bad luck"),
        (AdapterError("bad_rank", "rank 0"), "bad_rank", "rank 0"),
        (PeerError("no_engine", "none alive"), "no_engine", "none alive"),
        (RequestTimeoutError("store did not answer"), "timeout", "store did not answer"),
        (KeyError(), "internal", "KeyError"),
        (TimeoutError(), "internal", "TimeoutError"),
    ],
)
@pytest.mark.parametrize("message", [GetPlan(), ListAdapters()], ids=["handled", "spawned"])
def test_a_message_whose_handling_fails_is_refused_and_the_service_continues(
    message: Any, error: Exception, code: str, text: str
) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.up()
        stage.worker.handle_error = error
        with pytest.raises(PeerError) as refused:
            await stage.peer.request("worker", message, Pong, TIMEOUT_S)
        assert (refused.value.code, refused.value.message) == (code, text)
        stage.peer.send("worker", message)
        await asyncio.sleep(1)
        assert (await stage.ping()).state == "READY"
        await stage.down()

    play(scenario)


def test_messages_are_handled_during_a_drain() -> None:
    async def scenario(stage: Stage) -> None:
        stage.worker.drain_s = 2.0
        await stage.up()
        stopping = asyncio.create_task(stage.down())
        await asyncio.sleep(0.5)
        assert (await stage.ping()).state == "DRAINING"
        stage.peer.send("worker", Abort(request_id="x"))
        await stopping
        assert stage.worker.diary[2:] == ["draining", "abort x while DRAINING", "drained", "closed"]

    play(scenario)


def test_a_drain_that_takes_too_long_is_cancelled() -> None:
    async def scenario(stage: Stage) -> None:
        stage.worker.drain_s = 3600.0
        await stage.up()
        started_s = asyncio.get_running_loop().time()
        await stage.down()
        assert asyncio.get_running_loop().time() - started_s == pytest.approx(3.0, abs=0.1)
        assert stage.worker.diary[2:] == ["draining", "closed"]

    play(scenario)


def test_a_second_stop_changes_nothing() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.up()
        stage.worker.stop()
        await stage.down()
        stage.worker.stop()
        assert stage.worker.diary.count("draining") == 1

    play(scenario)


def test_spawned_work_does_not_outlive_the_service() -> None:
    async def scenario(stage: Stage) -> None:
        ended: list[str] = []

        async def endless(name: str) -> None:
            try:
                await asyncio.sleep(3600)
            finally:
                ended.append(name)
                stage.worker.spawn(endless("its child"))

        with pytest.raises(RuntimeError, match="worker does not run yet"):
            stage.worker.spawn(endless("too early"))
        await stage.up()
        stage.worker.spawn(endless("first"))
        await asyncio.sleep(0.1)
        await stage.down()
        stage.worker.spawn(endless("too late"))
        assert ended == ["first"]

    play(scenario)


def test_work_spawned_during_a_crash_does_not_hide_the_crash() -> None:
    async def scenario(stage: Stage) -> None:
        async def stubborn() -> None:
            try:
                await asyncio.sleep(3600)
            finally:
                stage.worker.spawn(asyncio.sleep(3600))

        await stage.up()
        stage.worker.spawn(stubborn())
        stage.worker.loop_error = ZeroDivisionError("tick")
        assert stage.running is not None
        with pytest.raises(ZeroDivisionError):
            await stage.running

    play(scenario)


def test_invalid_messages_are_counted_in_the_metrics() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.up()
        stage.peer.send("worker", Pong(name="", state="", incarnation="", pid=0, protocol=0))
        stage.peer.send("nobody", Ping())
        await asyncio.sleep(0.1)
        text = stage.worker.metrics.render().decode()
        assert 'loraserve_bus_bad_messages_total{reason="bad_message",sender="peer"} 1.0' in text
        await stage.down()

    play(scenario)
