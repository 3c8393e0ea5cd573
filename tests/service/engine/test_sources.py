"""Which source a read takes when others fail or misbehave: real reader, real tcp, scripted peers."""

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from loraserve.engine.loading import speeds
from loraserve.engine.loading.sources import SlabReadError
from loraserve.messages import LeaseGranted, LeaseSlab, ReadRegion, ReleaseLease, RenewLease, SlabDamaged
from loraserve.messages.transfer import TRANSFER_PROTOCOL_VERSION
from loraserve.testing.engine.load_scene import LoadScene as Scene
from loraserve.testing.engine.load_scene import Scenario, play
from loraserve.testing.scripted_owner import BEFORE


@pytest.fixture
def scene(models: Any, scripted_store: Any) -> Callable[..., None]:
    def run(scenario: Scenario, peers: int = 1) -> None:
        play(scenario, models.slabs["one"], scripted_store(models.slabs), peers)

    return run


def other_handle(granted: LeaseGranted, **changes: Any) -> LeaseGranted:
    handle = msgspec.structs.replace(granted.handles[0], **changes)
    return msgspec.structs.replace(granted, handles=(handle,))


WRONG: dict[str, Callable[[LeaseGranted], LeaseGranted]] = {
    "memory that is gone": lambda granted: other_handle(granted, token="0" * 32),
    "outside the region": lambda granted: msgspec.structs.replace(granted, offset_bytes=1 << 40),
    "before the region": lambda granted: msgspec.structs.replace(granted, offset_bytes=-1),
    "elsewhere in the region": lambda granted: msgspec.structs.replace(granted, offset_bytes=0),
    "another protocol": lambda granted: other_handle(granted, protocol=TRANSFER_PROTOCOL_VERSION + 1),
    "another size": lambda granted: msgspec.structs.replace(granted, slab_bytes=granted.slab_bytes - 16),
    "another's memory": lambda granted: other_handle(granted, owner="engine-7"),
    "nothing": lambda granted: msgspec.structs.replace(granted, handles=()),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_peer_with_a_wrong_offer_is_left_for_the_next_source(scene: Callable[..., None], what: str) -> None:
    async def scenario(scene: Scene) -> None:
        scene.owners[0].change = WRONG[what]
        assert await scene.load() == "store"
        assert scene.failed("engine-1") == (1, what == "elsewhere in the region")

    scene(scenario)


@pytest.mark.parametrize("code", ["not_found", "loading", "mismatch", "making_room", "too_many_leases", "version"])
def test_a_peer_that_grants_no_lease_is_left_for_the_next_source(scene: Callable[..., None], code: str) -> None:
    async def scenario(scene: Scene) -> None:
        scene.owners[0].refuses = code
        assert await scene.load() == "engine-2"
        assert scene.failed("engine-1") == (1, 0)
        assert scene.owners[0].count(ReadRegion) == 0

    scene(scenario, peers=2)


def test_damaged_bytes_are_complained_about_and_read_from_the_next_source(scene: Callable[..., None]) -> None:
    async def scenario(scene: Scene) -> None:
        owner = scene.owners[0]
        owner.memory[len(BEFORE) + len(scene.slab.data) - 1] ^= 1
        assert await scene.load() == "store"
        await asyncio.sleep(0.01)
        (complaint,) = [each for each in owner.seen if isinstance(each, SlabDamaged)]
        assert (complaint.version, complaint.layer) == (scene.slab.version, scene.slab.header.shape.layers - 1)
        assert owner.count(ReleaseLease) == 1
        assert scene.failed("engine-1") == (1, 1)
        # The peer is not asked again at once.
        assert await scene.load() == "store"
        assert owner.count(LeaseSlab) == 1

    scene(scenario)


def test_a_peer_that_dies_during_a_read_is_left_for_another(scene: Callable[..., None]) -> None:
    async def scenario(scene: Scene) -> None:
        dying = scene.owners[0]
        dying.stalls = True
        loading = asyncio.create_task(scene.load())
        await scene.until(lambda: dying.count(ReadRegion))
        scene.network.kill("engine-1")
        assert await loading != "engine-1"
        assert await scene.load() != "engine-1"

    scene(scenario, peers=2)


def test_a_lease_is_renewed_during_the_read_and_its_end_ends_the_read(
    scene: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speeds, "HEDGE_FLOOR_S", 30.0)

    async def scenario(scene: Scene) -> None:
        owner = scene.owners[0]
        owner.stalls, owner.lasts_s = True, 0.1
        loading = asyncio.create_task(scene.load())
        await scene.until(lambda: owner.count(RenewLease) >= 3)
        assert not loading.done()
        owner.renews = False
        assert await loading == "store"
        assert scene.failed("engine-1") == (1, 0)

    scene(scenario)


def test_a_cancelled_read_releases_its_lease_and_writes_no_more(scene: Callable[..., None]) -> None:
    async def scenario(scene: Scene) -> None:
        owner = scene.owners[0]
        owner.stalls = True
        loading = asyncio.create_task(scene.load())
        await scene.until(lambda: owner.count(ReadRegion))
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading
        before = bytes(scene.memory)
        await asyncio.sleep(0.02)
        assert owner.count(ReleaseLease) == 1
        assert bytes(scene.memory) == before

    scene(scenario)


def test_without_a_monitor_the_store_is_read(scene: Callable[..., None]) -> None:
    async def scenario(scene: Scene) -> None:
        scene.network.kill("monitor")
        assert await scene.load() == "store"
        assert scene.owners[0].count(LeaseSlab) == 0

    scene(scenario)


def test_if_all_sources_fail_the_store_s_reason_is_reported(scene: Callable[..., None]) -> None:
    async def scenario(scene: Scene) -> None:
        scene.owners[0].refuses = "not_found"
        scene.store.slabs.clear()
        with pytest.raises(SlabReadError, match="no such slab; register the adapter again"):
            await scene.load()
        scene.check_around()

    scene(scenario)
