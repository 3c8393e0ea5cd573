"""An engine whose pool holds one adapter: evicted ones are read from its host cache, by itself and by peers."""

from collections.abc import Callable
from threading import Event
from typing import Any

import numpy as np
import pytest

from loraserve.adapter.format import decode_header
from loraserve.cost import extent_bytes
from loraserve.engine.loading.memory import HostPool, find_damaged_layer
from loraserve.errors import PeerError
from loraserve.messages import (
    ReadCounts,
)
from loraserve.messages.transfer import ShmHandle
from loraserve.testing.clock import FakeClock
from loraserve.testing.engine.leasing_peer import LeasingPeer
from loraserve.transfer.protocol import ByteRange
from loraserve.transfer.shm import ShmReader

Play = Callable[..., None]
TIMEOUT_S = 20.0
CACHE_BYTES = 1 << 20


def largest(models: Any, adapters: int = 1) -> int:
    return adapters * extent_bytes(max(ref.slab_bytes for ref in models.refs.values()))


async def runs(stage: Any, request: str, adapter: str) -> None:
    await stage.admit(request, adapter)
    await stage.finished(request)
    assert stage.tokens[request] == stage.models.expected(adapter, 8)


async def cached(stage: Any, *names: str) -> None:
    """Wait until the engine reports exactly these adapters as cached."""
    versions = {stage.models.refs[name].version for name in names}
    await stage.fresh_load()
    await stage.until(lambda: set(stage.load.adapters.cached) == versions)


def reads(stage: Any) -> dict[str, ReadCounts]:
    return {each.source: each for each in stage.counters.reads}


def tier(stage: Any) -> Any:
    return stage.engine._adapters.cache


def poison(stage: Any, adapter: str) -> None:
    entry = tier(stage).cache.get(stage.models.refs[adapter].version)
    np.frombuffer(tier(stage).memory.view(entry.offset_bytes, 1), np.uint8)[0] ^= 1


async def refused(asked: Any) -> str:
    with pytest.raises(PeerError) as refusal:
        await asked
    return refusal.value.code


def test_an_evicted_adapter_is_reloaded_without_the_store(play: Play, models: Any) -> None:
    async def scenario(stage: Any) -> None:
        for number, adapter in enumerate(("one", "two")):
            await runs(stage, f"first-{number}", adapter)
        await cached(stage, "one")
        asked = stage.store.chunks_asked
        for number, adapter in enumerate(("one", "two", "one", "two")):
            await runs(stage, f"again-{number}", adapter)
        assert stage.store.chunks_asked == asked
        await cached(stage, "one", "two")
        assert (reads(stage)["cache"].reads, reads(stage)["store"].reads) == (4, 2)
        for _ in range(2):
            assert (await stage.fresh_counters()).leaks == 0
        tier(stage).validate()

    play(scenario, pool_bytes=largest(models), host_cache_bytes=CACHE_BYTES)


def test_an_extent_is_not_filled_before_its_old_slab_is_saved(play: Play, models: Any) -> None:
    gate = Event()

    async def scenario(stage: Any) -> None:
        await runs(stage, "a", "one")
        chunks = stage.store.chunks_asked
        tier(stage)._thread.submit(gate.wait, TIMEOUT_S)
        await stage.admit("b", "two")
        for _ in range(3):
            load = await stage.fresh_load()
            assert (load.adapters.loading, load.adapters.cached) == ((models.refs["two"].version,), ())
        assert stage.store.chunks_asked == chunks
        gate.set()
        await stage.finished("b")
        await runs(stage, "c", "one")
        await cached(stage, "one", "two")
        assert (reads(stage)["cache"].reads, reads(stage)["cache"].failed) == (1, 0)

    play(scenario, pool_bytes=largest(models), host_cache_bytes=CACHE_BYTES)


def test_on_a_cpu_nothing_is_cached_unless_configured(play: Play, models: Any) -> None:
    async def scenario(stage: Any) -> None:
        for number, adapter in enumerate(("one", "two", "one")):
            await runs(stage, f"run-{number}", adapter)
        await cached(stage)
        assert stage.capabilities.cache_abilities is None
        assert reads(stage)["store"].reads == 3

    play(scenario, pool_bytes=largest(models))


def test_a_damaged_cached_slab_is_read_from_the_store_instead(play: Play, models: Any) -> None:
    async def scenario(stage: Any) -> None:
        await runs(stage, "a", "one")
        await runs(stage, "b", "two")
        await cached(stage, "one")
        poison(stage, "one")
        await runs(stage, "c", "one")
        await cached(stage, "two")
        assert (reads(stage)["cache"].mismatched, reads(stage)["store"].reads) == (1, 3)
        assert stage.counters.leaks == 0

    play(scenario, pool_bytes=largest(models), host_cache_bytes=CACHE_BYTES)


def test_the_slab_with_more_requests_stays_cached(play: Play, models: Any) -> None:
    async def scenario(stage: Any) -> None:
        stage.clock.current = FakeClock()
        for number in range(3):
            await runs(stage, f"one-{number}", "one")
        await runs(stage, "two", "two")
        await runs(stage, "one-again", "one")
        await cached(stage, "one")
        assert "not cached" in tier(stage).cache.story.lines(models.refs["two"].version)[-1]

    play(scenario, pool_bytes=largest(models), host_cache_bytes=largest(models))


def test_a_peer_reads_and_verifies_a_cached_slab(play: Play, models: Any) -> None:
    async def scenario(stage: Any) -> None:
        await runs(stage, "a", "one")
        peer = LeasingPeer(stage.network)
        await runs(stage, "b", "two")
        await cached(stage, "one")
        granted, encoded = await peer.lease(models.refs["one"])
        assert {handle.length_bytes for handle in granted.handles} == {CACHE_BYTES}
        handle = next(each for each in granted.handles if isinstance(each, ShmHandle))
        into, reader = bytearray(granted.slab_bytes), ShmReader()
        await reader.read(handle, [ByteRange(granted.offset_bytes, granted.slab_bytes)], memoryview(into))
        reader.close()
        header = decode_header(encoded)
        assert find_damaged_layer(HostPool(memoryview(into)), header, 0, range(header.shape.layers)) is None
        assert (await peer.renew(granted.lease_id)).lasts_s > 0
        assert await peer.release(granted.lease_id)
        assert not await peer.release(granted.lease_id)

    play(scenario, pool_bytes=largest(models), host_cache_bytes=CACHE_BYTES)


def test_a_cached_slab_stays_while_a_peer_reads_it(play: Play, models: Any) -> None:
    async def scenario(stage: Any) -> None:
        await runs(stage, "a", "one")
        await runs(stage, "b", "two")
        await cached(stage, "one")
        peer = LeasingPeer(stage.network)
        granted, _ = await peer.lease(models.refs["one"])
        for number in range(20):
            # With this many requests the measured speeds, which vary on a busy machine, do not decide what is kept.
            await runs(stage, f"two-{number}", "two")
        await runs(stage, "c", "one")
        await cached(stage, "one")
        assert await peer.release(granted.lease_id)
        await runs(stage, "d", "two")
        await runs(stage, "e", "one")
        await cached(stage, "two")
        assert (
            await refused(peer.lease(models.refs["two"], "other size", slab_bytes=models.refs["two"].slab_bytes - 1))
            == "mismatch"
        )
        assert (
            await refused(peer.lease(models.refs["one"], "other size", slab_bytes=models.refs["one"].slab_bytes - 1))
            == "mismatch"
        )
        assert stage.counters.leaks == 0

    play(scenario, pool_bytes=largest(models), host_cache_bytes=largest(models))


def test_a_read_keeps_its_cache_lease_when_the_pool_has_the_adapter_again(play: Play, models: Any) -> None:
    async def scenario(stage: Any) -> None:
        await runs(stage, "a", "one")
        await runs(stage, "b", "two")
        await cached(stage, "one")
        peer = LeasingPeer(stage.network)
        first, _ = await peer.lease(models.refs["one"])
        await runs(stage, "c", "one")
        again, _ = await peer.lease(models.refs["one"])
        assert (again.lease_id, again.offset_bytes) == (first.lease_id, first.offset_bytes)
        another, _ = await peer.lease(models.refs["one"], "another read")
        pools = {handle.length_bytes for handle in another.handles}
        assert pools == {stage.capabilities.pool_bytes}, "the pool comes first"

    play(scenario, pool_bytes=largest(models), host_cache_bytes=CACHE_BYTES)


def test_cache_leases_of_a_peer_s_earlier_process_end(play: Play, models: Any) -> None:
    async def scenario(stage: Any) -> None:
        await runs(stage, "a", "one")
        await runs(stage, "b", "two")
        await cached(stage, "one")
        await LeasingPeer(stage.network).lease(models.refs["one"])
        stage.network.kill("engine-1")
        assert [entry.leases for entry in tier(stage).cache.entries()] == [1]
        await LeasingPeer(stage.network).lease(models.refs["two"])
        assert [entry.leases for entry in tier(stage).cache.entries()] == [0]

    play(scenario, pool_bytes=largest(models), host_cache_bytes=CACHE_BYTES)
