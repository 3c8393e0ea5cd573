"""The planner when engines, the disk or the registry fail."""

import asyncio
from pathlib import Path

import pytest

from loraserve.errors import PeerError
from loraserve.messages import PreparePlan, RegistryChanged


def test_a_copy_that_cannot_be_prepared_is_left_out_and_reported(play) -> None:
    async def scenario(stage) -> None:
        wanted = stage.copies((await stage.rebalance(dry_run=True)).plan)
        lost = next(version for engine, version in sorted(wanted) if engine == "e0")
        stage.failing["e0"] = {lost: "no room beside what the plan pins"}
        done = await stage.rebalance()
        assert stage.copies(done.plan) == wanted - {("e0", lost)} == stage.copies(stage.plans[-1])
        assert done.applied
        assert done.failed == ("e0: no room beside what the plan pins",)
        assert lost not in {move.version for move in done.moves}
        stage.failing["e0"] = {}
        again = await stage.rebalance()
        assert (stage.copies(again.plan), again.failed) == (wanted, ())
        assert [(move.version, move.target) for move in again.moves] == [(lost, "e0")]

    play(scenario)


def test_shares_of_the_remaining_copies_sum_to_one(play) -> None:
    async def scenario(stage) -> None:
        await stage.send_registry(stage.adapters[:1])
        await stage.send_loads(asked=stage.adapters[:1])
        stage.failing["e1"] = {stage.adapters[0].version: "broken"}
        done = await stage.rebalance()
        assert [(p.engine, p.share) for p in done.plan.placements] == [("e0", 1.0)]

    play(scenario)


@pytest.mark.parametrize("script", [lambda _: None, lambda _: PeerError("draining", "it drains")], ids=["silent", "no"])
def test_an_engine_that_does_not_prepare_gets_no_copies_while_the_others_do(play, script) -> None:
    async def scenario(stage) -> None:
        stage.engines["e1"].script = script
        done = await stage.rebalance()
        assert {engine for engine, _ in stage.copies(done.plan)} == {"e0"}
        assert len(done.failed) == 2
        assert all(reason.startswith("e1: ") for reason in done.failed)
        assert asyncio.get_running_loop().time() < stage.config.planner.prepare_timeout_s + 20

    play(scenario)


def test_a_restarted_planner_waits_for_the_registry_and_retires_nothing(play) -> None:
    async def before(stage) -> None:
        await stage.rebalance()

    async def after(stage) -> None:
        kept = await stage.plan()
        await stage.send_loads(*stage.holding(kept))
        await asyncio.sleep(25.0)
        done = await stage.rebalance()
        assert (done.applied, len(done.failed)) == (False, 1)
        assert "the store has not sent its adapters" in done.failed[0]
        assert await stage.plan() == kept
        assert {what for what, _, _ in stage.history} == {"publish"}

    play(before)
    play(after, informed=False, interval_s=10.0)


def test_a_full_disk_leaves_the_old_plan_and_the_planner_alive(play, tmp_path: Path) -> None:
    async def scenario(stage) -> None:
        await stage.send_registry(stage.adapters[:2])
        first = (await stage.rebalance()).plan
        await stage.send_registry()
        folder, aside = tmp_path / "planner", tmp_path / "aside"
        folder.rename(aside)
        folder.write_text("a file where the folder was: nothing can be written")
        await stage.send_loads(*stage.holding(first))
        stage.history.clear()
        done = await stage.rebalance()
        assert (done.applied, done.moves, done.plan) == (False, (), first)
        assert "epoch 2 could not be written, epoch 1 stays" in done.failed[-1]
        assert stage.plans[-1] == first == await stage.plan()
        kept = {e: v for what, e, v in stage.history if what == "retire"}
        assert {(e, v) for e, versions in kept.items() for v in versions} == stage.copies(first)
        folder.unlink()
        aside.rename(folder)
        again = await stage.rebalance()
        assert (again.applied, again.plan.epoch, again.failed) == (True, 3, ())

    play(scenario)


def test_the_planner_plans_in_every_interval_even_after_a_failure(play, tmp_path: Path) -> None:
    async def scenario(stage) -> None:
        (tmp_path / "planner").write_text("in the way")
        await asyncio.sleep(25.0)
        assert len(stage.engines["e0"].got(PreparePlan)) == 2
        assert stage.plans == [], "without a plan nothing is published, since routers may have one"
        (tmp_path / "planner").unlink()
        await asyncio.sleep(10.0)
        assert [plan.epoch for plan in stage.plans] == [3], "epochs of failed roll-outs are not reused"

    play(scenario, interval_s=10.0)


def test_an_adapter_may_be_unregistered_while_a_plan_begins(play) -> None:
    async def scenario(stage) -> None:
        asking = asyncio.create_task(stage.rebalance())
        await asyncio.sleep(0)
        stage.store.publish("registry", RegistryChanged(revision=2, adapters=()))
        done = await asking
        assert done.applied
        assert {v for _, v in stage.copies(done.plan)} == {a.version for a in stage.adapters}
        assert stage.copies((await stage.rebalance()).plan) == set()

    play(scenario)
