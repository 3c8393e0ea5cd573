"""Hedges beside a read that takes much longer than predicted: real reader, real tcp, scripted peers."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from loraserve.clock import SystemClock
from loraserve.engine.loading import speeds
from loraserve.engine.loading.speeds import ReadSource
from loraserve.messages import ReadRegion, ReleaseLease, ToStore
from loraserve.testing.engine.load_scene import LoadScene as Scene
from loraserve.testing.engine.load_scene import Scenario, play


@pytest.fixture
def scene(models: Any, scripted_store: Any) -> Callable[..., None]:
    def run(scenario: Scenario, peers: int = 1) -> None:
        play(scenario, models.slabs["one"], scripted_store(models.slabs), peers)

    return run


def test_a_hedge_wins_if_the_first_peer_stalls(scene: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speeds, "HEDGE_FLOOR_S", 0.05)

    async def scenario(scene: Scene) -> None:
        scene.owners[0].stalls = True
        assert await scene.load() == "store"
        # A slow read does not count as a failure.
        assert scene.failed("engine-1") == (0, 0)
        await asyncio.sleep(0.01)
        assert scene.owners[0].count(ReleaseLease) == 1

    scene(scenario)


def test_a_first_read_that_ends_before_its_hedge_wins(
    scene: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speeds, "HEDGE_FLOOR_S", 0.05)

    async def scenario(scene: Scene) -> None:
        scene.owners[0].stalls = True
        scene.store.open.clear()
        loading = asyncio.create_task(scene.load())
        await scene.until(lambda: scene.store.chunks_asked)
        scene.owners[0].resume()
        assert await loading == "engine-1"
        assert scene.failed("store") == (0, 0)

    scene(scenario)


def test_a_hedge_that_fails_leaves_the_first_read_running(
    scene: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speeds, "HEDGE_FLOOR_S", 0.05)

    async def scenario(scene: Scene) -> None:
        scene.owners[0].stalls = True
        scene.store.corrupt = lambda chunk: chunk[:-1]
        loading = asyncio.create_task(scene.load())
        await scene.until(lambda: scene.failed("store") != (0, 0))
        scene.owners[0].resume()
        assert await loading == "engine-1"

    scene(scenario)


def test_a_load_hedges_after_another_load_s_hedge(scene: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speeds, "HEDGE_FLOOR_S", 0.05)

    async def scenario(scene: Scene) -> None:
        from_owner, known = ReadSource("engine-1", "tcp"), scene.sources.speeds
        for _ in range(50):
            # The prediction for this peer is so fast that both loads begin there.
            known.begin_read(from_owner)
            known.finish_read(from_owner, len(scene.slab.data), 1e-6)
        scene.owners[0].stalls = True
        scene.store.open.clear()
        both = [asyncio.create_task(scene.load()) for _ in range(2)]
        await scene.until(lambda: scene.owners[0].count(ReadRegion) == 2 and scene.store.chunks_asked)
        # By then the later load has found the store busy with the hedge of the other load.
        await asyncio.sleep(0.2)
        scene.store.open.set()
        assert await asyncio.gather(*both) == ["store", "store"]
        assert scene.failed("engine-1") == (0, 0), "it was waited for until it failed"

    scene(scenario)


def test_if_read_and_hedge_fail_the_first_read_s_failure_counts(
    scene: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that restarts is asked again, whatever the hedge's failure was."""
    monkeypatch.setattr(speeds, "HEDGE_FLOOR_S", 0.05)

    async def scenario(scene: Scene) -> None:
        owner, from_owner = scene.owners[0], ReadSource("engine-1", "tcp")
        for _ in range(8):
            scene.sources.speeds.begin_read(from_owner)
            scene.sources.speeds.fail_read(from_owner, SystemClock().monotonic_s())
        owner.stalls, owner.lasts_s = True, 0.2
        scene.store.open.clear()
        loading = asyncio.create_task(scene.load())
        await scene.until(lambda: scene.store.chunks_asked and owner.count(ReadRegion))
        scene.network.kill("store")
        await scene.until(lambda: scene.failed("store") != (0, 0))
        owner.renews, owner.refuses = False, "not_found"
        await scene.until(lambda: scene.failed("engine-1") != (0, 0))
        scene.store.open.set()
        serving = asyncio.create_task(scene.store.serve(scene.network.bus("store", ToStore)))
        assert await loading == "store"
        serving.cancel()

    scene(scenario)
