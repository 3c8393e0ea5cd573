"""Copies from the pool into the host cache: loads that wait for them, failures, and reading a slab back."""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Event

import numpy as np
import pytest

from loraserve.adapter.pack import Slab, pack_peft
from loraserve.engine.adapters.lifecycle import LoadedSlab
from loraserve.engine.host_cache.cache import HostCache
from loraserve.engine.host_cache.tier import FROM_CACHE, CacheTier
from loraserve.engine.loading.memory import HostPool, TransferTarget
from loraserve.engine.loading.sources import DamagedSlabError, SlabReadError
from loraserve.engine.loading.speeds import LinkSpeeds, ReadSource
from loraserve.engine.schedule.events import LeftSlab
from loraserve.messages import AdapterRef
from loraserve.model_shape import ModelShape
from loraserve.testing.clock import FakeClock
from loraserve.testing.tiny_model import write_peft_adapter

POOL_BYTES = 1 << 20
AT = 8192
SHAPE = ModelShape(2, 32, 2, 1, 16, 48, 64)
FROM_PEER = ReadSource("engine-1", "shm")


class SlowPool(HostPool):
    """A pool whose copies begin once ``open`` is set, and fail while ``breaks`` is set."""

    def __init__(self) -> None:
        super().__init__(memoryview(bytearray(POOL_BYTES)))
        self.open = Event()
        self.breaks = False

    def read_into(self, offset_bytes: int, into: memoryview) -> None:
        self.open.wait(20.0)
        if self.breaks:
            raise OSError("a page could not be read")
        super().read_into(offset_bytes, into)


class RecordingSpeeds(LinkSpeeds):
    """Records the sources for which a reload time was predicted."""

    def __init__(self) -> None:
        super().__init__()
        self.predicted: list[ReadSource] = []

    def predict(self, source: ReadSource, length_bytes: int) -> float:
        self.predicted.append(source)
        return 1.0


class Stage:
    """A cache tier, and a slab at AT in the pool that a test can evict."""

    def __init__(self, slab: Slab, cache_bytes: int = POOL_BYTES) -> None:
        self.pool = SlowPool()
        self.pool.write(AT, slab.data)
        self.slab = slab
        self.ref = AdapterRef(name="one", version=slab.version, rank=4, slab_bytes=slab.header.slab_bytes)
        self.tasks: list[asyncio.Task[None]] = []
        self.speeds = RecordingSpeeds()
        self.tier = CacheTier(HostCache(cache_bytes), cache_bytes, self.pool, FakeClock(), self.speeds)

    def evict(self, source: ReadSource = FROM_PEER) -> None:
        saving = self.tier.keep(LeftSlab(self.ref, AT), LoadedSlab(self.slab.header, source, 0.1))
        if saving is not None:
            self.tasks.append(asyncio.ensure_future(saving))
        self.tier.validate()

    async def saved(self) -> None:
        self.pool.open.set()
        await asyncio.gather(*self.tasks)
        self.tier.validate()

    async def reload(self, into: HostPool, offset_bytes: int, damaged: DamagedSlabError | None = None) -> list[int]:
        """Read the slab as a loader does; return the progress that was reported."""
        source = await self.tier.find(self.ref)
        assert source is not None
        assert await source.open(self.ref) == self.slab.header
        arrived: list[int] = []
        with ThreadPoolExecutor(1) as threads:
            await source.copy(
                self.ref, TransferTarget(into, offset_bytes, self.ref.slab_bytes, arrived.append, threads)
            )
        source.close(damaged)
        return arrived


Play = Callable[..., None]


@pytest.fixture(scope="module")
def slab(tmp_path_factory: pytest.TempPathFactory) -> Slab:
    folder = write_peft_adapter(tmp_path_factory.mktemp("adapters") / "one", SHAPE, rank=4, seed=1)
    return pack_peft(Path(folder), SHAPE, "float32", 64)


@pytest.fixture
def play(slab: Slab) -> Play:
    def run(scenario: Callable[[Stage], Awaitable[None]], cache_bytes: int = POOL_BYTES) -> None:
        async def main() -> None:
            stage = Stage(slab, cache_bytes)
            with closing(stage.tier):
                await asyncio.wait_for(scenario(stage), 20.0)

        asyncio.run(main())

    return run


def test_an_evicted_slab_is_reloaded_unchanged(play: Play) -> None:
    async def scenario(stage: Stage) -> None:
        stage.evict()
        await stage.saved()
        stage.pool.write(AT, bytes(stage.ref.slab_bytes))
        assert stage.tier.cache.versions == (stage.ref.version,)
        into = HostPool(memoryview(bytearray(POOL_BYTES)))
        arrived = await stage.reload(into, 4096)
        assert arrived[-1] == stage.ref.slab_bytes
        assert bytes(into.view(4096, stage.ref.slab_bytes)) == bytes(stage.slab.data)
        stage.tier.validate()
        assert not any(entry.reads for entry in stage.tier.cache.entries())

    play(scenario)


def test_a_load_waits_only_for_copies_out_of_its_extent(play: Play) -> None:
    async def scenario(stage: Stage) -> None:
        stage.evict()
        end = AT + stage.ref.slab_bytes
        for first, length in ((0, AT), (end, 4096)):
            await stage.tier.wait_saved(first, length)
        waiting = [
            asyncio.ensure_future(stage.tier.wait_saved(first, length))
            for first, length in ((0, AT + 1), (end - 1, 1), (AT, 4096), (0, POOL_BYTES))
        ]
        await asyncio.sleep(0.01)
        assert not any(load.done() for load in waiting)
        await stage.saved()
        await asyncio.gather(*waiting)

    play(scenario)


def test_a_load_of_a_slab_being_saved_waits_and_reads_it_from_the_cache(play: Play) -> None:
    async def scenario(stage: Stage) -> None:
        stage.evict()
        assert stage.tier.cache.versions == ()
        asking = asyncio.ensure_future(stage.tier.find(stage.ref))
        await asyncio.sleep(0.01)
        assert not asking.done()
        await stage.saved()
        assert await asking is not None

    play(scenario)


def test_cancelling_a_waiting_load_does_not_disturb_the_copy(play: Play) -> None:
    async def scenario(stage: Stage) -> None:
        stage.evict()
        waiting = asyncio.ensure_future(stage.tier.wait_saved(AT, 1))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        await stage.saved()
        assert stage.tier.cache.versions == (stage.ref.version,)

    play(scenario)


@pytest.mark.parametrize("given_up", [False, True])
def test_a_failed_copy_leaves_nothing_and_ends_the_waits(play: Play, given_up: bool) -> None:
    async def scenario(stage: Stage) -> None:
        stage.pool.breaks = True
        stage.evict()
        waiting = asyncio.ensure_future(stage.tier.wait_saved(AT, 1))
        await asyncio.sleep(0.01)
        if given_up:
            stage.tasks[0].cancel()
        stage.pool.open.set()
        await asyncio.wait(stage.tasks)
        await waiting
        stage.tier.validate()
        assert await stage.tier.find(stage.ref) is None
        assert list(stage.tier.cache.entries()) == []

    play(scenario)


def test_a_cached_slab_is_not_copied_again_and_keeps_its_reload_time(play: Play) -> None:
    async def scenario(stage: Stage) -> None:
        stage.evict(FROM_PEER)
        await stage.saved()
        stage.evict(FROM_CACHE)
        assert len(stage.tasks) == 1
        assert stage.speeds.predicted == [FROM_PEER], "the second time nothing is known of any other source"

    play(scenario)


def test_a_slab_that_a_load_finds_damaged_leaves_the_cache(play: Play) -> None:
    async def scenario(stage: Stage) -> None:
        stage.evict()
        await stage.saved()
        await stage.reload(HostPool(memoryview(bytearray(POOL_BYTES))), 0, DamagedSlabError(1))
        assert await stage.tier.find(stage.ref) is None
        stage.tier.validate()

    play(scenario)


@pytest.mark.parametrize("layer", [None, 1])
def test_a_copy_is_checked_and_dropped_if_damaged(play: Play, layer: int | None) -> None:
    async def scenario(stage: Stage) -> None:
        stage.evict()
        await stage.saved()
        entry = stage.tier.cache.get(stage.ref.version)
        memory = stage.tier.memory
        assert entry is not None
        assert memory is not None
        if layer is not None:
            first = entry.offset_bytes + stage.slab.header.layer(layer).start
            np.frombuffer(memory.view(first, 1), np.uint8)[0] ^= 1
        assert await stage.tier.check_copy(stage.ref.version) == layer
        assert (stage.tier.cache.versions == ()) is (layer is not None)
        stage.tier.validate()

    play(scenario)


def test_opening_a_missing_slab_or_one_of_another_size_fails(play: Play) -> None:
    async def scenario(stage: Stage) -> None:
        stage.evict()
        await stage.saved()
        source = await stage.tier.find(stage.ref)
        assert source is not None
        larger = AdapterRef(name="one", version=stage.ref.version, rank=4, slab_bytes=stage.ref.slab_bytes + 1)
        with pytest.raises(SlabReadError, match="mismatch"):
            await source.open(larger)
        source.close(None)
        stage.tier.cache.damage(stage.ref.version, 0.0)
        with pytest.raises(SlabReadError, match="not_found"):
            await source.open(stage.ref)
        source.close(None)
        stage.tier.validate()

    play(scenario)


def test_without_cache_memory_nothing_is_kept(play: Play) -> None:
    async def scenario(stage: Stage) -> None:
        stage.evict()
        assert (stage.tasks, stage.tier.memory, stage.tier.cache.versions) == ([], None, ())
        assert await stage.tier.find(stage.ref) is None
        await stage.tier.wait_saved(0, POOL_BYTES)

    play(scenario, cache_bytes=0)
