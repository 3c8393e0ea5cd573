"""The result of a load: loaded, failed, or cancelled before it begins and while it runs."""

import asyncio
import inspect
import re
from types import SimpleNamespace
from typing import Any

import pytest

from loraserve.adapter.format import SlabHeader, make_uniform_layout
from loraserve.config import EngineConfig
from loraserve.engine.adapters.lifecycle import LifecycleEvent, LoadedSlab
from loraserve.engine.adapters.pool import AdapterPool
from loraserve.engine.compute.protocol import DeviceLostError
from loraserve.engine.loading import loader
from loraserve.engine.loading.arrival import AnnouncedLoad, ReadAnnouncer
from loraserve.engine.loading.loader import AdapterLoader
from loraserve.engine.loading.sources import SlabReadError
from loraserve.engine.loading.speeds import FROM_STORE, LinkSpeeds
from loraserve.engine.schedule.events import CANCELLED, AdapterLoaded, AdapterLoadFailed, LoadAdapter
from loraserve.engine.schedule.report import SpeedMeter
from loraserve.messages import AdapterRef
from loraserve.model_shape import ModelShape
from loraserve.testing.clock import FakeClock

HEADER: SlabHeader = make_uniform_layout(ModelShape(1, 8, 1, 1, 8, 8, 8), "float32", 1)
REF = AdapterRef(name="name-a", version="a", rank=1, slab_bytes=HEADER.slab_bytes)
SLAB = LoadedSlab(HEADER, FROM_STORE, 0.5)
FAILED = AdapterLoadFailed("a", CANCELLED, "nothing wants the adapter any more")


class HeldLoader(AdapterLoader):
    """A loader whose reads end once ``go`` is set; ``ended`` says how the last one ended."""

    def __init__(self, runner: Any, pool: AdapterPool) -> None:
        cache: Any = NoCache()
        sources: Any = SimpleNamespace(speeds=LinkSpeeds(), clock=FakeClock())
        announcer = ReadAnnouncer(runner, SpeedMeter(), sources.speeds, lambda event: None)
        super().__init__(runner, pool, cache, sources, announcer, EngineConfig(digest_threads=1))
        self.go = asyncio.Event()
        self.ended = ""
        self.error: Exception | None = None

    async def read_slab(
        self, adapter: AdapterRef, offset_bytes: int, announced: AnnouncedLoad | None = None
    ) -> LoadedSlab:
        self.ended = "begun"
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            self.ended = "cleaned up"
            raise
        self.ended = "done"
        if self.error is not None:
            raise self.error
        return SLAB


class NoCache:
    async def wait_saved(self, offset_bytes: int, length_bytes: int) -> None:
        return None


class Scene:
    """A loader over fakes, with the adapter placed in the pool."""

    def __init__(self) -> None:
        self.pool = AdapterPool(1 << 20, 2)
        self.installed: list[int] = []
        self.refuses: Exception | None = None
        self.loader = HeldLoader(SimpleNamespace(install=self.install, steps_ahead=0, pool=None), self.pool)

    def install(self, slot: int, header: SlabHeader, base_elements: int) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.installed.append(slot)

    def load(self) -> "asyncio.Task[AdapterLoaded | AdapterLoadFailed]":
        placed = self.pool.place(REF, 0.0)
        assert placed is not None
        return asyncio.create_task(self.loader.load(LoadAdapter(REF, placed.slot, placed.offset_bytes)))

    def cancel(self) -> None:
        """Cancel the load as the scheduler and the service do."""
        assert self.pool.apply("a", LifecycleEvent.CANCELLED).adapter == REF
        self.loader.cancel("a")


def test_a_load_that_nothing_cancels_returns_the_slab() -> None:
    async def main() -> None:
        scene = Scene()
        task = scene.load()
        scene.loader.go.set()
        assert await task == AdapterLoaded("a", 0, SLAB)
        assert scene.installed == [0]
        scene.loader.cancel("a")

    asyncio.run(main())


def test_a_cancelled_load_returns_once_the_read_has_ended() -> None:
    async def main() -> None:
        scene = Scene()
        task = scene.load()
        await asyncio.sleep(0)
        scene.loader.cancel("b")
        scene.cancel()
        assert await task == FAILED
        assert scene.loader.ended == "cleaned up"
        assert task.cancelling() == 0
        assert scene.installed == []

    asyncio.run(main())


def test_a_load_that_is_cancelled_before_it_begins_reads_nothing() -> None:
    async def main() -> None:
        scene = Scene()
        task = scene.load()
        scene.cancel()
        assert await task == FAILED
        assert scene.loader.ended == ""

    asyncio.run(main())


def test_a_task_that_is_cancelled_itself_raises_that() -> None:
    async def main() -> None:
        scene = Scene()
        task = scene.load()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert scene.loader.ended == "cleaned up"

    asyncio.run(main())


def test_a_version_can_be_loaded_again_after_its_load_has_ended() -> None:
    async def main() -> None:
        scene = Scene()
        for _ in range(2):
            task = scene.load()
            await asyncio.sleep(0)
            scene.cancel()
            assert await task == FAILED
            scene.pool.apply("a", LifecycleEvent.LOAD_FAILED)
            assert len(scene.pool.remove_leaving()) == 1
        scene.loader.go.set()
        assert isinstance(await scene.load(), AdapterLoaded)

    asyncio.run(main())


def test_a_failed_read_or_a_slab_that_does_not_fit_is_returned_with_its_code() -> None:
    async def main() -> None:
        scene = Scene()
        scene.loader.go.set()
        scene.loader.error = SlabReadError("timeout", "too slow")
        assert await scene.load() == AdapterLoadFailed("a", "timeout", "timeout: too slow")
        scene.pool.apply("a", LifecycleEvent.LOAD_FAILED)
        scene.pool.remove_leaving()
        scene.loader.error, scene.refuses = None, ValueError("of another dtype")
        assert await scene.load() == AdapterLoadFailed("a", "mismatch", "of another dtype")

    asyncio.run(main())


def test_a_lost_device_is_raised() -> None:
    async def main() -> None:
        scene = Scene()
        scene.loader.go.set()
        scene.refuses = DeviceLostError("gone")
        with pytest.raises(DeviceLostError):
            await scene.load()

    asyncio.run(main())


def test_the_call_tree_that_the_module_shows_is_that_of_the_loader() -> None:
    shown: dict[str, set[str]] = {}
    callers: list[str] = []
    for indent, name in re.findall(r"^    ( *)(_?[a-z][a-z_]+) {2,}\w", loader.__doc__ or "", re.MULTILINE):
        callers[len(indent) // 2 :] = [name]
        shown.setdefault(name, set())
        for caller in callers[-2:-1]:
            shown[caller].add(name)
    sources = {name: inspect.getsource(getattr(AdapterLoader, name)) for name in shown}
    called = {name: set(re.findall(r"self\.(\w+)\(", source)) for name, source in sources.items()}
    assert next(iter(shown)) == "load"
    assert shown == called
