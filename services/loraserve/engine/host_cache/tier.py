"""The host cache's memory: peers can map it, and a GPU copies to and from it directly."""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

import msgspec

from loraserve.adapter.format import SlabHeader
from loraserve.clock import Clock
from loraserve.engine.host_cache.cache import CachedSlab, HostCache
from loraserve.engine.loading.memory import HostPool, Landing, PoolMemory
from loraserve.engine.loading.slab_reader import damaged_layer
from loraserve.engine.loading.source import Damaged, LoadFailed
from loraserve.engine.loading.speeds import ReadSource
from loraserve.engine.schedule.events import LeftSlab
from loraserve.log import get_logger
from loraserve.messages import AdapterRef
from loraserve.threads import run_in_thread
from loraserve.transfer.shm import SharedMemory


class CacheMemory:
    """``copied_from`` is the pool that the slabs come from."""

    def __init__(self, length_bytes: int, copied_from: PoolMemory) -> None:
        self._shared = SharedMemory(length_bytes, "lower engine.host_cache_bytes")
        self.pool = HostPool(self._shared.view, self._shared)
        self._copied_from = copied_from
        self._closing = ExitStack()
        self._closing.callback(self._shared.close)
        self._log = get_logger(__name__)

    def page_lock(self) -> None:
        """Where the pool is a GPU's. It takes a while: belongs in a thread. Without it copies are slower, no more."""
        if not self._copied_from.waits:
            return
        # Imported here: machines without a GPU need not have a torch that could.
        from loraserve.engine.cuda.pool import page_locked

        try:
            self._closing.enter_context(page_locked(self._shared.view, self._copied_from))
        except Exception as error:
            self._log.warning("host_cache_not_page_locked", reason=str(error), bytes=len(self.pool))
        else:
            self._log.info("host_cache_page_locked", bytes=len(self.pool))

    def close(self) -> None:
        """No copy may be under way."""
        self._closing.close()


FROM_CACHE = ReadSource("cache", "memory")
PIECE_BYTES, DEVICE_PIECE_BYTES = 1 << 20, 8 << 20
"""Of what is copied in the event loop, and of what a device copies while the loop goes on."""


class CacheSource:
    """See Source. It stays while it is read."""

    way = FROM_CACHE

    def __init__(self, cache: HostCache, memory: HostPool, clock: Clock) -> None:
        self._cache = cache
        self._memory = memory
        self._clock = clock
        self._slab: CachedSlab | None = None

    async def open(self, adapter: AdapterRef) -> SlabHeader:
        slab = self._slab = self._cache.read(adapter.version)
        if slab is None:
            raise LoadFailed("not_found", f"{adapter.version} has left the host cache; read it from another source")
        if slab.adapter.slab_bytes != adapter.slab_bytes:
            raise LoadFailed(
                "mismatch",
                f"slab_bytes is {adapter.slab_bytes} in the request and {slab.adapter.slab_bytes} in the host cache; "
                "register the adapter again",
            )
        return slab.header

    async def copy(self, adapter: AdapterRef, landing: Landing) -> None:
        slab = self._slab
        assert slab is not None, "a source is opened first"

        async def fetch(start: int, length: int) -> memoryview:
            return self._memory.view(slab.offset_bytes + start, length)

        await landing.stream(DEVICE_PIECE_BYTES if landing.pool.waits else PIECE_BYTES, fetch)

    def close(self, damaged: Damaged | None) -> None:
        slab, self._slab = self._slab, None
        if slab is None:
            return
        self._cache.done(slab)
        if damaged is not None:
            self._cache.damage(slab.adapter.version, self._clock.monotonic_s())


class _Save(msgspec.Struct):
    """A copy out of these bytes of the pool."""

    first: int
    end: int
    over: asyncio.Event


class CacheTier:
    """``cache_bytes`` 0 keeps nothing. ``predict_s`` says how long a slab of so many bytes takes to be read.

    Copies run one after another in a thread, beside the steps; ``spawn`` runs what waits for them.
    """

    def __init__(
        self,
        cache_bytes: int,
        pool: PoolMemory,
        clock: Clock,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        predict_s: Callable[[ReadSource | None, int], float],
    ) -> None:
        self.cache = HostCache(cache_bytes)
        self._pool = pool
        self._clock = clock
        self._spawn = spawn
        self._predict_s = predict_s
        self._saves: dict[str, _Save] = {}
        self._ways: dict[str, ReadSource] = {}
        """By which those in the pool came that did not come from here."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cache")
        self._memory = CacheMemory(cache_bytes, pool) if cache_bytes else None
        if self._memory is not None:
            self._thread.submit(self._memory.page_lock)
        self._log = get_logger(__name__)

    @property
    def memory(self) -> HostPool | None:
        """What peers can read; None where nothing is kept."""
        return self._memory.pool if self._memory else None

    @property
    def versions(self) -> tuple[str, ...]:
        """What can be read here."""
        return self.cache.versions

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self._memory is not None:
            self._memory.close()

    def used(self, version: str) -> None:
        """A request for it came."""
        self.cache.used(version, self._clock.monotonic_s())

    def loaded(self, version: str, way: ReadSource) -> None:
        """It is in the pool."""
        self.cache.loaded(version)
        if way != FROM_CACHE:
            self._ways[version] = way

    def evicted(self, left: LeftSlab, header: SlabHeader) -> None:
        """A slab has left the pool: it is kept here if that is worth more than what has to go for it."""
        adapter, version = left.adapter, left.adapter.version
        way, here = self._ways.pop(version, None), self.cache.get(version)
        known_s = here.reload_s if way is None and here is not None else None
        reload_s = known_s or self._predict_s(way, adapter.slab_bytes)
        offset = self.cache.offer(adapter, header, reload_s, self._clock.monotonic_s())
        if offset is not None:
            end = left.offset_bytes + adapter.slab_bytes
            self._saves[version] = _Save(left.offset_bytes, end, asyncio.Event())
            self._spawn(self._save(left, offset))

    def dropped(self, version: str) -> None:
        """A slab has left the pool that was damaged there: nothing is saved, what is here stands for itself again."""
        self._ways.pop(version, None)
        self.cache.unloaded(version)

    async def before_reuse(self, offset_bytes: int, length_bytes: int) -> None:
        """Returns once nothing is saved from these bytes of the pool any more."""
        end = offset_bytes + length_bytes
        for save in [save for save in self._saves.values() if save.first < end and offset_bytes < save.end]:
            await save.over.wait()

    async def source(self, adapter: AdapterRef) -> CacheSource | None:
        """To load it from here; None where it is not here. What is being saved is waited for."""
        if adapter.version in self._saves:
            await self._saves[adapter.version].over.wait()
        if adapter.version not in self.cache.versions or self.memory is None:
            return None
        return CacheSource(self.cache, self.memory, self._clock)

    async def look_at(self, version: str) -> int | None:
        """Its first layer that is damaged here, where there is one: from then on nobody gets it from here."""
        slab, memory = self.cache.read(version), self.memory
        if slab is None or memory is None:
            return None
        layer: int | None = None
        try:
            layers = range(slab.header.shape.layers)
            look = partial(damaged_layer, memory, slab.header, slab.offset_bytes, layers)
            layer = await run_in_thread(self._thread, look)
        finally:
            self.cache.done(slab)
        if layer is not None:
            self.cache.damage(version, self._clock.monotonic_s())
            self._log.error("cached_slab_damaged", adapter=slab.adapter.name, version=version, layer=layer)
        return layer

    def story(self, version: str) -> list[str]:
        """What happened to an adapter here."""
        return self.cache.story(version)

    def validate(self) -> None:
        """What the cache waits for is under way, and nothing else is."""
        self.cache.validate()
        saving = {slab.adapter.version for slab in self.cache.entries() if not slab.is_complete}
        assert saving == self._saves.keys(), "a save is waited for in vain"

    async def _save(self, left: LeftSlab, offset_bytes: int) -> None:
        version = left.adapter.version
        try:
            assert self.memory is not None, "a place was given in no memory"
            into = self.memory.view(offset_bytes, left.adapter.slab_bytes)
            await run_in_thread(self._thread, partial(self._pool.read_into, left.offset_bytes, into))
            self.cache.saved(version, self._clock.monotonic_s())
        except BaseException as error:
            # A device that is lost shows at the next step or load as well: those end the process.
            self.cache.failed(version, self._clock.monotonic_s())
            if not isinstance(error, Exception):
                raise
            self._log.warning("adapter_not_cached", adapter=left.adapter.name, reason=repr(error))
        finally:
            self._saves.pop(version).over.set()
