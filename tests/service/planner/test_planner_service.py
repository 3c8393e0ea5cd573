"""The planner prepares, publishes, retires and stores plans."""

import asyncio
from pathlib import Path

from loraserve.messages import Plan, ToRouter
from loraserve.planner.rollout.machine import RETRY_S
from loraserve.testing.clock import START_UNIX_S
from loraserve.testing.reports import engine_seen


def test_a_plan_is_prepared_then_published_then_old_copies_retired(play) -> None:
    async def scenario(stage) -> None:
        for engine in stage.engines.values():
            engine.delay_s = 3.0
        stage.history.clear()
        done = await stage.rebalance()
        assert done.applied
        assert done.failed == ()
        assert [what for what, _, _ in stage.history] == ["prepare", "prepare", "publish", "retire", "retire"]
        assert {v for _, v in stage.copies(done.plan)} == {a.version for a in stage.adapters}
        for what, engine, versions in stage.history:
            if what != "publish":
                assert versions == {v for e, v in stage.copies(done.plan) if e == engine}
        assert stage.plans[-1] == done.plan == await stage.plan()
        assert (done.plan.epoch, len(done.moves)) == (1, 4)
        assert done.plan.created_unix_s > START_UNIX_S

    play(scenario)


def test_a_dry_run_answers_the_plan_and_changes_nothing(play, tmp_path: Path) -> None:
    async def scenario(stage) -> None:
        before = await stage.plan()
        stage.history.clear()
        dry = await stage.rebalance(dry_run=True)
        await asyncio.sleep(10.0)
        assert not dry.applied
        assert len(dry.moves) == 4
        assert (dry.plan.epoch, await stage.plan()) == (1, before)
        assert stage.history == []
        assert not (tmp_path / "planner").exists()
        done = await stage.rebalance()
        assert (stage.copies(done.plan), done.moves) == (stage.copies(dry.plan), dry.moves)

    play(scenario)


def test_a_rebalance_without_a_ready_engine_is_refused_with_the_reason(play) -> None:
    async def scenario(stage) -> None:
        await stage.send_registry()
        for loads in ((), (engine_seen("e0", state="STARTING"),)):
            if loads:
                await stage.send_loads(*loads)
            done = await stage.rebalance()
            assert (done.applied, done.message, done.failed) == (False, "no engine is ready", ("no engine is ready",))
            assert done.plan.epoch == 0

    play(scenario, informed=False)


def test_a_plan_that_is_still_the_best_is_kept(play) -> None:
    async def scenario(stage) -> None:
        first = await stage.rebalance()
        await stage.send_loads(*stage.holding(first.plan))
        stage.history.clear()
        again = await stage.rebalance()
        assert (again.applied, again.moves, again.plan) == (False, (), first.plan)
        assert again.message == "the plan is right as it is"
        assert (again.failed, stage.history) == ((), [])

    play(scenario)


def test_a_restarted_engine_is_asked_for_its_copies_again(play) -> None:
    async def scenario(stage) -> None:
        first = await stage.rebalance()
        e0, _ = stage.holding(first.plan)
        stage.history.clear()
        await stage.send_loads(e0, engine_seen("e1", incarnation="i2"))
        lost = {v for e, v in stage.copies(first.plan) if e == "e1"}
        assert stage.history == [("prepare", "e1", lost)]
        await asyncio.sleep(RETRY_S)
        again = await stage.rebalance()
        assert (again.applied, again.moves) == (True, ())
        assert ("prepare", "e1", lost) in stage.history[1:], "the request was repeated"

    play(scenario)


def test_a_plan_survives_a_restart_and_epochs_continue(play) -> None:
    kept: list[Plan] = []

    async def before(stage) -> None:
        kept.append((await stage.rebalance()).plan)

    async def after(stage) -> None:
        assert await stage.plan() == kept[0] == stage.plans[0]
        await stage.send_registry(stage.adapters[:2])
        await stage.send_loads(*stage.holding(kept[0]), asked=stage.adapters[:2])
        done = await stage.rebalance()
        assert done.plan.epoch == kept[0].epoch + 1
        assert {v for _, v in stage.copies(done.plan)} == {a.version for a in stage.adapters[:2]}

    play(before)
    play(after, informed=False)


def test_two_rebalances_at_once_run_one_after_the_other(play) -> None:
    async def scenario(stage) -> None:
        for engine in stage.engines.values():
            engine.delay_s = 2.0
        stage.history.clear()
        first, second = await asyncio.gather(stage.rebalance(), stage.rebalance())
        assert [first.applied, second.applied] == [True, False]
        assert second.message == "the plan is right as it is", "it was planned after the first was in force"
        assert [what for what, _, _ in stage.history] == ["prepare", "prepare", "publish", "retire", "retire"]

    play(scenario)


def test_late_subscribers_get_the_plan_soon(play) -> None:
    async def scenario(stage) -> None:
        done = await stage.rebalance()
        late = stage.network.bus("router-2", ToRouter)
        late.subscribe("planner", "plan")
        async with asyncio.timeout(5.0):
            assert (await late.receive()).message == done.plan

    play(scenario)
