"""Peers that lease adapters of an engine's pool, and requests that wait for those leases to end."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraserve.adapter.format import decode_header, slab_version
from loraserve.adapter.pack import pack_peft
from loraserve.config import TransferConfig
from loraserve.cost import extent_bytes
from loraserve.engine.loading.memory import HostPool, find_damaged_layer
from loraserve.errors import PeerError
from loraserve.messages import (
    Admit,
    Admitted,
    SamplingParams,
    SlabDamaged,
)
from loraserve.messages.transfer import TRANSFER_PROTOCOL_VERSION, ShmHandle
from loraserve.testing.clock import FakeClock
from loraserve.testing.engine.leasing_peer import LeasingPeer
from loraserve.testing.engine.offline import adapter_reference
from loraserve.testing.tiny_model import write_peft_adapter
from loraserve.transfer.protocol import ByteRange
from loraserve.transfer.shm import ShmReader

Play = Callable[..., None]
TIMEOUT_S = 20.0


async def resident(stage: Any, *names: str) -> FakeClock:
    """Run each adapter once and stop the engine's clock."""
    clock = stage.clock.current = FakeClock()
    for name in names:
        clock.advance(1.0)
        await stage.admit(f"warm-{name}", name)
        await stage.finished(f"warm-{name}")
    return clock


async def waits(stage: Any, name: str) -> None:
    """Send a request that finds no room, and check that it still waits after a while."""
    await stage.admit("waits", name)
    for _ in range(3):
        load = await stage.fresh_load()
        assert (load.queue.waiting, load.adapters.loading) == (1, ())
    assert load.memory.pool_room_bytes == 0


def pool_for(models: Any, adapters: int) -> int:
    return adapters * extent_bytes(max(ref.slab_bytes for ref in models.refs.values()))


def test_a_grant_has_all_fields_needed_to_read_and_verify_the_slab(play: Play, models: Any) -> None:
    async def scenario(stage: Any) -> None:
        await resident(stage, "one", "two")
        granted, header_bytes = await LeasingPeer(stage.network).lease(models.refs["two"])
        assert (granted.version, granted.lasts_s) == (models.refs["two"].version, 5.0)
        header = decode_header(header_bytes)
        assert slab_version(header) == granted.version
        reader = ShmReader()
        handle = next(each for each in granted.handles if isinstance(each, ShmHandle))
        into = bytearray(granted.slab_bytes)
        await reader.read(handle, [ByteRange(granted.offset_bytes, granted.slab_bytes)], memoryview(into))
        reader.close()
        assert find_damaged_layer(HostPool(memoryview(into)), header, 0, range(header.shape.layers)) is None
        assert bytes(into) == bytes(models.slabs["two"].data)

    play(scenario)


def test_an_engine_without_transports_grants_leases_without_handles(play: Play, models: Any) -> None:
    async def scenario(stage: Any) -> None:
        await resident(stage, "one")
        granted, _ = await LeasingPeer(stage.network).lease(models.refs["one"])
        assert granted.handles == ()

    play(scenario, transfer=TransferConfig(transports=()))


async def refused(asked: Any) -> str:
    with pytest.raises(PeerError) as refusal:
        await asked
    assert refusal.value.message.startswith("engine-0")
    return refusal.value.code


def test_each_refused_lease_has_its_code(play: Play, models: Any) -> None:
    async def scenario(stage: Any) -> None:
        await resident(stage, "one")
        stage.store.open.clear()
        await stage.admit("loads", "two")
        peer, one, two = LeasingPeer(stage.network), models.refs["one"], models.refs["two"]
        assert await refused(peer.lease(one, protocol=TRANSFER_PROTOCOL_VERSION + 1)) == "version"
        assert await refused(peer.lease(one, version="unheard of")) == "not_found"
        assert await refused(peer.lease(one, slab_bytes=one.slab_bytes + 1)) == "mismatch"
        assert await refused(peer.lease(two)) == "loading"
        for number in range(16):
            await peer.lease(one, f"read-{number}")
        assert await refused(peer.lease(one, "one more")) == "too_many_leases"
        stage.store.open.set()
        await stage.finished("loads")
        assert stage.tokens["loads"] == models.expected("two", 8)

    play(scenario)


def test_a_load_that_failed_leaves_nothing_to_lend(play: Play, models: Any) -> None:
    async def scenario(stage: Any) -> None:
        stage.store.corrupt = lambda chunk: bytes([chunk[0] ^ 1]) + chunk[1:]
        await stage.admit("hurt", "one")
        await stage.finished("hurt")
        assert await refused(LeasingPeer(stage.network).lease(models.refs["one"])) == "not_found"

    play(scenario)


def test_a_request_waits_for_the_reader_of_the_only_extent_and_runs_once_that_is_released(
    play: Play, models: Any
) -> None:
    async def scenario(stage: Any) -> None:
        await resident(stage, "one")
        peer = LeasingPeer(stage.network)
        granted, _ = await peer.lease(models.refs["one"])
        await waits(stage, "two")
        assert await refused(LeasingPeer(stage.network, "engine-2").lease(models.refs["one"])) == "making_room"
        assert await peer.release(granted.lease_id)
        await stage.finished("waits")
        assert stage.tokens["waits"] == models.expected("two", 8)
        assert not await peer.release(granted.lease_id), "once more does no harm"
        assert await refused(peer.lease(models.refs["one"])) == "not_found"
        for _ in range(2):
            assert (await stage.fresh_counters()).leaks == 0, "something of it is left"

    play(scenario, pool_bytes=pool_for(models, 1))


def test_a_lease_that_is_not_renewed_ends_by_its_deadline(play: Play, models: Any) -> None:
    async def scenario(stage: Any) -> None:
        clock = await resident(stage, "one")
        peer = LeasingPeer(stage.network)
        granted, _ = await peer.lease(models.refs["one"])
        clock.advance(4.0)
        assert (await peer.renew(granted.lease_id)).lasts_s == 5.0
        clock.advance(4.0)
        await waits(stage, "two")
        clock.advance(1.5)
        await stage.finished("waits")
        assert stage.tokens["waits"] == models.expected("two", 8)
        assert await refused(peer.renew(granted.lease_id)) == "expired"

    play(scenario, pool_bytes=pool_for(models, 1))


def test_leases_of_a_dead_reader_end_when_its_next_process_asks(play: Play, models: Any) -> None:
    async def scenario(stage: Any) -> None:
        await resident(stage, "one")
        granted, _ = await LeasingPeer(stage.network).lease(models.refs["one"])
        await waits(stage, "two")
        stage.network.kill("engine-1")
        reborn = LeasingPeer(stage.network)
        assert await refused(reborn.renew(granted.lease_id)) == "not_yours"
        assert await refused(reborn.lease(models.refs["one"])) == "making_room"
        await stage.finished("waits")
        assert stage.tokens["waits"] == models.expected("two", 8)

    play(scenario, pool_bytes=pool_for(models, 1))


def test_a_leased_adapter_is_not_evicted(play: Play, models: Any, tmp_path: Path) -> None:
    shape = models.slabs["one"].header.shape
    third = pack_peft(write_peft_adapter(tmp_path / "third", shape, rank=8, seed=7), shape, "float32", 64)
    ref = adapter_reference("third", third)

    async def scenario(stage: Any) -> None:
        await resident(stage, "one", "two")
        stage.store.slabs[third.version] = third
        granted, _ = await LeasingPeer(stage.network).lease(models.refs["one"])
        stage.tokens["third"] = []
        sampling = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
        admit = Admit(request_id="third", gateway="gateway-0", prompt_tokens=(5, 6), sampling=sampling, adapter=ref)
        await stage.ask(admit, Admitted)
        await stage.finished("third")
        load = await stage.fresh_load()
        assert {each.name for each in load.adapters.resident} == {"one", "third"}, "one was unused for longer"
        again, _ = await LeasingPeer(stage.network, "engine-2").lease(models.refs["one"])
        assert again.offset_bytes == granted.offset_bytes

    play(scenario, pool_bytes=pool_for(models, 2))


def test_nothing_stays_pinned_when_readers_vanish(play: Play, models: Any) -> None:
    async def scenario(stage: Any) -> None:
        clock = await resident(stage, "one", "two")
        peers = [LeasingPeer(stage.network, f"engine-{number}") for number in range(1, 4)]
        await asyncio.gather(*(peer.lease(models.refs["one"]) for peer in peers))
        for peer in peers:
            stage.network.kill(peer.bus.name)
        assert (await stage.fresh_load()).memory.pool_free_bytes < stage.capabilities.pool_bytes
        clock.advance(5.0)
        await stage.until(lambda: stage.load.memory.pool_free_bytes == stage.capabilities.pool_bytes)
        assert stage.counters.leaks == 0

    play(scenario)


def test_only_a_reader_with_a_lease_can_complain_about_a_slab(play: Play, models: Any, capfd: Any) -> None:
    async def scenario(stage: Any) -> None:
        await resident(stage, "one")
        peer, other = LeasingPeer(stage.network), LeasingPeer(stage.network, "engine-2")
        granted, _ = await peer.lease(models.refs["one"])
        for bus, version in ((other.bus, granted.version), (peer.bus, "another")):
            bus.send("engine-0", SlabDamaged(version=version, lease_id=granted.lease_id, layer=0))
        await peer.release(granted.lease_id)
        peer.bus.send("engine-0", SlabDamaged(version=granted.version, lease_id=granted.lease_id, layer=0))
        granted, _ = await peer.lease(models.refs["one"], "again")
        said = capfd.readouterr().out
        assert said.count("complaint_without_lease") == 3
        assert "own_copy_checked" not in said
        peer.bus.send("engine-0", SlabDamaged(version=granted.version, lease_id=granted.lease_id, layer=0))
        await stage.until(lambda: "damaged_layer=None" in capfd.readouterr().out)
        # The data was damaged in transit. The owner's copy is sound and stays.
        assert models.refs["one"].version in stage.engine._scheduler.residency.pool

    play(scenario)
