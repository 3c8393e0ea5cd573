"""The engine's process: requests, tokens, plans, refusals, reports, draining and failures."""

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from loraserve.clock import SystemClock
from loraserve.config import ModelConfig
from loraserve.engine.compute.protocol import DeviceLostError
from loraserve.engine.service import EngineService
from loraserve.engine.setup import build_runner
from loraserve.errors import ConfigError
from loraserve.messages import (
    Abort,
    AnnounceCapabilities,
    MeasuredSpeed,
    Prepared,
    PreparePlan,
    RetireCopies,
    RetireDone,
)
from loraserve.service import ServiceState
from loraserve.testing.memory_bus import MemoryNetwork

Play = Callable[..., None]


@pytest.mark.parametrize("steps_ahead", [0, 1, 2])
def test_requests_get_the_tokens_of_their_adapters(play: Play, models: Any, steps_ahead: int) -> None:
    async def scenario(stage: Any) -> None:
        for name, adapter in (("base", ""), ("one", "one"), ("two", "two"), ("again", "one")):
            answer = await stage.admit(name, adapter)
            assert (answer.ok, answer.incarnation) == (True, stage.engine.bus.incarnation)
        await stage.finished("base", "one", "two", "again")
        for name, adapter in (("base", ""), ("one", "one"), ("two", "two"), ("again", "one")):
            assert (stage.tokens[name], stage.finish[name]) == (models.expected(adapter, 8), "length"), name
        assert len({tuple(tokens) for tokens in stage.tokens.values()}) == 3

    play(scenario, steps_ahead=steps_ahead)


def test_a_request_that_cannot_run_is_refused_in_the_answer(play: Play, models: Any) -> None:
    async def scenario(stage: Any) -> None:
        answer = await stage.admit("long", prompt=(3,) * 600)
        assert (answer.ok, answer.code) == (False, "context_length")
        assert "maximum context length" in answer.message
        assert stage.failed == {}
        assert (await stage.fresh_load()).queue.waiting == 0

    play(scenario)


@pytest.mark.parametrize("steps_ahead", [0, 1, 2])
def test_an_aborted_request_releases_everything(play: Play, models: Any, steps_ahead: int) -> None:
    async def scenario(stage: Any) -> None:
        await stage.admit("gone", "one", tokens=400)
        await stage.until(lambda: len(stage.tokens["gone"]) > 3 and "gone" in stage.load.queue.request_ids)
        for name in ("gone", "never known"):
            stage.gateway.send("engine-0", Abort(request_id=name))
        await stage.until(lambda: stage.load.queue.request_ids == ())
        seen = len(stage.tokens["gone"])
        load = await stage.fresh_load()
        assert load.memory.kv_blocks_free == stage.capabilities.kv_blocks
        assert [(a.name, a.running) for a in load.adapters.resident] == [("one", 0)]
        await stage.admit("next")
        await stage.finished("next")
        assert (len(stage.tokens["gone"]), stage.finish.get("gone")) == (seen, None)
        assert (await stage.fresh_counters()).leaks == 0

    play(scenario, steps_ahead=steps_ahead)


def test_a_request_sent_twice_runs_once(play: Play, models: Any) -> None:
    async def scenario(stage: Any) -> None:
        await stage.admit("twice", tokens=100)
        await stage.until(lambda: stage.tokens["twice"])
        assert (await stage.admit("twice", tokens=100)).ok
        await stage.finished("twice")
        assert stage.tokens["twice"] == models.expected("", 100)

    play(scenario)


def test_a_failed_step_fails_its_requests_and_the_engine_continues(play: Play, models: Any) -> None:
    async def scenario(stage: Any) -> None:
        # The engine does not check token ids against the vocabulary, because the gateway does.
        await stage.admit("broken", prompt=(1, 99_999))
        await stage.finished("broken")
        assert stage.failed["broken"].code == "engine_error"
        assert stage.failed["broken"].message.startswith("engine-0 could not compute a step: ")
        await stage.admit("next")
        await stage.finished("next")
        assert stage.tokens["next"] == models.expected("", 8)
        assert (await stage.fresh_counters()).leaks == 0

    play(scenario)


def test_a_lost_device_ends_the_process(play: Play) -> None:
    async def scenario(stage: Any) -> None:
        await stage.admit("deadly", prompt=(1, 88_888))
        await stage.until(stage.running.done)
        with pytest.raises(DeviceLostError, match="illegal memory access"):
            await stage.running
        stage.running = asyncio.ensure_future(asyncio.sleep(0))

    play(scenario, steps_ahead=1)


class LostPool:
    """The pool of a GPU that was lost while no step ran."""

    on_device = True

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def __len__(self) -> int:
        return len(self._pool)

    def write(self, offset_bytes: int, data: object) -> None:
        raise DeviceLostError("CUDA error: unspecified launch failure")


def test_a_load_that_finds_the_device_lost_ends_the_process(play: Play) -> None:
    def build(config: Any, progress: Any) -> Any:
        runner: Any = build_runner(config, progress)
        runner.pool = LostPool(runner.pool)
        return runner

    async def scenario(stage: Any) -> None:
        await stage.admit("adapted", "one")
        await stage.until(stage.running.done)
        with pytest.raises(DeviceLostError, match="unspecified launch failure"):
            await stage.running
        stage.running = asyncio.ensure_future(asyncio.sleep(0))

    play(scenario, build=build)


@pytest.mark.parametrize("steps_ahead", [1, 2])
def test_a_step_that_fails_at_once_is_reported_after_earlier_steps(play: Play, models: Any, steps_ahead: int) -> None:
    async def scenario(stage: Any) -> None:
        await stage.admit("early", tokens=100)
        await stage.until(lambda: len(stage.tokens["early"]) > 3)
        await stage.admit("broken", prompt=(1, 99_999))
        await stage.finished("broken", "early")
        # Both were in the failed step.
        assert {name: failed.code for name, failed in stage.failed.items()} == {
            "broken": "engine_error",
            "early": "engine_error",
        }
        seen = len(stage.tokens["early"])
        assert stage.tokens["early"] == models.expected("", 100)[:seen]
        await stage.admit("next", "one")
        await stage.finished("next")
        assert stage.tokens["next"] == models.expected("one", 8)
        assert len(stage.tokens["early"]) == seen
        load = await stage.fresh_load()
        assert (stage.counters.leaks, load.memory.kv_blocks_free) == (0, stage.capabilities.kv_blocks)

    play(scenario, steps_ahead=steps_ahead)


@pytest.mark.parametrize("steps_ahead", [0, 1, 2])
def test_draining_finishes_running_requests_and_refuses_new_ones(play: Play, models: Any, steps_ahead: int) -> None:
    async def scenario(stage: Any) -> None:
        await stage.admit("runs", tokens=300)
        await stage.admit("waits for its adapter", "one", tokens=20)
        stage.engine.stop()
        await stage.until(lambda: stage.load.state == ServiceState.DRAINING)
        refused = await stage.admit("late")
        assert (refused.ok, refused.code, refused.message) == (False, "draining", "engine-0 is draining")
        assert (await stage.admit("runs")).ok, "it has that one already"
        await stage.running
        assert stage.tokens["runs"] == models.expected("", 300)
        assert stage.tokens["waits for its adapter"] == models.expected("one", 20)
        assert (stage.tokens["late"], stage.engine.state) == ([], ServiceState.STOPPED)

    play(scenario, steps_ahead=steps_ahead)


def test_requests_that_outlast_the_drain_are_handed_over(play: Play, models: Any) -> None:
    async def scenario(stage: Any) -> None:
        await stage.admit("short", tokens=4)
        await stage.admit("endless", tokens=100_000)
        await stage.until(lambda: len(stage.tokens["endless"]) > 5)
        stage.engine.stop()
        await stage.running
        assert stage.tokens["short"] == models.expected("", 4)
        assert {name: failed.code for name, failed in stage.failed.items()} == {"endless": "draining"}
        assert stage.engine.state is ServiceState.STOPPED

    play(scenario, drain_timeout_s=0.2)


def test_the_reports_match_the_engines_state(play: Play, models: Any) -> None:
    async def scenario(stage: Any) -> None:
        first = await stage.fresh_load()
        assert (first.engine, first.state, first.incarnation) == ("engine-0", "READY", stage.engine.bus.incarnation)
        assert first.speed == MeasuredSpeed()
        for name, adapter in (("base", ""), ("one", "one")):
            await stage.admit(name, adapter, tokens=10)
        await stage.finished("base", "one")
        load = await stage.fresh_load()
        ref = models.refs["one"]
        assert [(a.name, a.version, a.rank, a.slab_bytes) for a in load.adapters.resident] == [
            (ref.name, ref.version, ref.rank, ref.slab_bytes)
        ]
        counted = {t.version: (t.prefill_tokens, t.decode_tokens, t.requests) for t in stage.statistics.adapter_tokens}
        assert counted == {"": (20, 9, 1), ref.version: (20, 9, 1)}
        assert 0 < load.speed.decode_step_s < 5
        assert load.speed.prefill_tokens_per_s > 0
        assert load.speed.load.slab_bytes == ref.slab_bytes
        assert load.speed.decode_step.duration_s == load.speed.decode_step_s
        assert load.speed.prefill_step.prefill_tokens / load.speed.prefill_step.duration_s == pytest.approx(
            load.speed.prefill_tokens_per_s
        )
        assert load.speed.prefill_step.rank_tokens > 0, "it knows whose prefill that was"
        assert load.speed.load.bytes_per_s > 0
        assert stage.counters.steps >= 10
        assert load.speed.decode_steps + load.speed.prefill_steps == stage.counters.steps
        assert load.speed.loads == 1

    play(scenario)


def test_a_plan_is_answered_once_its_copies_are_resident(play: Play, models: Any) -> None:
    async def scenario(stage: Any) -> None:
        del stage.store.slabs[models.refs["two"].version]
        answer = await stage.ask(PreparePlan(epoch=4, adapters=tuple(models.refs.values())), Prepared)
        assert (answer.engine, answer.epoch, answer.incarnation) == ("engine-0", 4, stage.engine.bus.incarnation)
        assert answer.failed.keys() == {models.refs["two"].version}
        assert "no such slab" in answer.failed[models.refs["two"].version]
        assert [(a.name, a.pinned) for a in (await stage.fresh_load()).adapters.resident] == [("one", True)]
        assert (await stage.ask(RetireCopies(epoch=4, keep=()), RetireDone)).unpinned == 1
        assert [(a.name, a.pinned) for a in (await stage.fresh_load()).adapters.resident] == [("one", False)]

    play(scenario)


@pytest.mark.parametrize("epoch", [5, 4], ids=["newer", "same"])
def test_each_plan_gets_its_own_answer(play: Play, models: Any, epoch: int) -> None:
    """A restarted planner may ask for the same epoch again while the first request is still being prepared."""

    async def scenario(stage: Any) -> None:
        one = models.refs["one"]
        stage.store.open.clear()
        first = asyncio.create_task(stage.ask(PreparePlan(epoch=4, adapters=(one,)), Prepared))
        await stage.until(lambda: stage.store.chunks_asked)
        second = asyncio.create_task(stage.ask(PreparePlan(epoch=epoch, adapters=(one,)), Prepared))
        ended = await first
        assert (ended.epoch, ended.failed) == (4, {one.version: "a newer plan came"})
        assert not second.done()
        stage.store.open.set()
        done = await second
        assert (done.epoch, done.failed) == (epoch, {})

    play(scenario)


def test_an_outdated_plan_is_answered_while_a_newer_one_is_prepared(play: Play, models: Any) -> None:
    """The last plan of a dead planner arrives after its successor's plan, followed by a retirement of both."""

    async def scenario(stage: Any) -> None:
        one, two = models.refs["one"], models.refs["two"]
        stage.store.open.clear()
        newer = asyncio.create_task(stage.ask(PreparePlan(epoch=5, adapters=(one,)), Prepared))
        await stage.until(lambda: stage.store.chunks_asked)
        late = await stage.ask(PreparePlan(epoch=4, adapters=(two,)), Prepared)
        assert (late.epoch, late.failed.keys()) == (4, {two.version})
        await stage.ask(RetireCopies(epoch=4, keep=()), RetireDone)
        assert not newer.done()
        stage.store.open.set()
        done = await newer
        assert (done.epoch, done.failed) == (5, {})
        load = await stage.fresh_load()
        assert [(a.name, a.pinned) for a in load.adapters.resident] == [("one", True)]
        assert load.adapters.plan_epoch == 5

    play(scenario)


def test_an_engine_without_a_model_does_not_start(models: Any) -> None:
    async def main() -> None:
        config = msgspec.structs.replace(models.config, model=ModelConfig())
        engine = EngineService(config, MemoryNetwork().bus("engine-0", EngineService.inbox), SystemClock())
        with pytest.raises(ConfigError, match=r"model\.path is empty"):
            await engine.run()

    asyncio.run(main())


def test_the_engine_announces_its_capabilities_at_start_and_when_the_monitor_asks(play: Play) -> None:
    async def scenario(stage: Any) -> None:
        await stage.fresh_load()
        announced, stage.capabilities = stage.capabilities, None
        assert (announced.engine, announced.incarnation) == ("engine-0", stage.engine.bus.incarnation)
        assert announced.pool_bytes == stage.load.memory.pool_free_bytes
        assert announced.kv_blocks == stage.load.memory.kv_blocks_free
        await stage.fresh_load()
        assert stage.capabilities is None, "it does not repeat them with each load"
        stage.monitor.send("engine-0", AnnounceCapabilities())
        await stage.until(lambda: stage.capabilities == announced)

    play(scenario)
