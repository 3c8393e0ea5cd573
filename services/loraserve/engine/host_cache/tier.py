"""The memory of the host cache, the copies of evicted slabs into it, and the cache as a source of slabs."""

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

import msgspec

from loraserve.adapter.format import SlabHeader
from loraserve.clock import Clock
from loraserve.engine.adapters.lifecycle import LoadedSlab
from loraserve.engine.host_cache.cache import CachedSlab, CachedState, HostCache
from loraserve.engine.loading.memory import HostPool, PoolMemory, TransferTarget, find_damaged_layer
from loraserve.engine.loading.sources import DamagedSlabError, SlabReadError
from loraserve.engine.loading.speeds import FROM_STORE, LinkSpeeds, ReadSource
from loraserve.engine.schedule.events import LeftSlab
from loraserve.log import get_logger
from loraserve.messages import AdapterRef
from loraserve.threads import run_in_thread
from loraserve.transfer.shm import SharedMemory

FROM_CACHE = ReadSource("cache", "memory")
PIECE_BYTES, DEVICE_PIECE_BYTES = 1 << 20, 8 << 20
"""Piece sizes of reads from the cache to a pool in host memory, copied in the event loop, or to a pool on a device."""


class CacheMemory:
    """The memory of the host cache. Peers can map it, and a GPU can copy to and from it directly."""

    def __init__(self, length_bytes: int, copied_from: PoolMemory) -> None:
        self._shared = SharedMemory(length_bytes, "lower engine.host_cache_bytes")
        self.pool = HostPool(self._shared.view, self._shared)
        self._copied_from = copied_from
        self._closing = ExitStack()
        self._closing.callback(self._shared.close)
        self._log = get_logger(__name__)

    def page_lock(self) -> None:
        """Page-lock the memory for faster copies if the pool is on a GPU. This is slow: call it in a thread."""
        if not self._copied_from.on_device:
            return
        # Imported here because machines without a GPU may have a torch without CUDA.
        from loraserve.engine.cuda.memory import page_locked

        try:
            self._closing.enter_context(page_locked(self._shared.view, self._copied_from))
        except Exception as error:
            self._log.warning("host_cache_not_page_locked", reason=str(error), bytes=len(self.pool))
        else:
            self._log.info("host_cache_page_locked", bytes=len(self.pool))

    def close(self) -> None:
        self._closing.close()


class CacheSource:
    """Reads a slab from the host cache and pins it there during the read. Implements `SlabSource`."""

    source = FROM_CACHE

    def __init__(self, cache: HostCache, memory: HostPool, clock: Clock) -> None:
        self._cache = cache
        self._memory = memory
        self._clock = clock
        self._slab: CachedSlab | None = None

    async def open(self, adapter: AdapterRef) -> SlabHeader:
        """Pin the slab and return its header. Raises SlabReadError."""
        slab = self._slab = self._cache.begin_read(adapter.version)
        if slab is None:
            message = f"{adapter.version} has left the host cache; read it from another source"
            raise SlabReadError("not_found", message)
        if slab.adapter.slab_bytes != adapter.slab_bytes:
            raise SlabReadError(
                "mismatch",
                f"slab_bytes is {adapter.slab_bytes} in the request and {slab.adapter.slab_bytes} in the host cache; "
                "register the adapter again",
            )
        return slab.header

    async def copy(self, adapter: AdapterRef, target: TransferTarget) -> None:
        slab = self._slab
        assert slab is not None, "a source is opened first"

        async def fetch(start: int, length: int) -> memoryview:
            return self._memory.view(slab.offset_bytes + start, length)

        await target.stream(DEVICE_PIECE_BYTES if target.pool.on_device else PIECE_BYTES, fetch)

    def close(self, damaged: DamagedSlabError | None) -> None:
        """Unpin the slab. If it is damaged, drop it from the cache."""
        slab, self._slab = self._slab, None
        if slab is None:
            return
        self._cache.end_read(slab)
        if damaged is not None:
            self._cache.damage(slab.adapter.version, self._clock.monotonic_s())


class _Save(msgspec.Struct):
    """A copy in progress of the pool's bytes from ``start`` to ``end`` into the cache."""

    start: int
    end: int
    finished: asyncio.Event


class CacheTier:
    """Copies evicted slabs into the host cache as ``cache`` decides, one at a time, concurrently with steps.

    If ``cache_bytes`` is 0, nothing is cached. ``speeds`` predicts the time to reload a slab.
    """

    def __init__(self, cache: HostCache, cache_bytes: int, pool: PoolMemory, clock: Clock, speeds: LinkSpeeds) -> None:
        self.cache = cache
        self._pool = pool
        self._clock = clock
        self._speeds = speeds
        self._saves: dict[str, _Save] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cache")
        self._memory = CacheMemory(cache_bytes, pool) if cache_bytes else None
        if self._memory is not None:
            self._thread.submit(self._memory.page_lock)
        self._log = get_logger(__name__)

    @property
    def memory(self) -> HostPool | None:
        return self._memory.pool if self._memory else None

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self._memory is not None:
            self._memory.close()

    def keep(self, left: LeftSlab, slab: LoadedSlab) -> Coroutine[Any, Any, None] | None:
        """Return a coroutine that copies an evicted slab into the cache; None if the slab is not to be cached.

        The caller must run the coroutine at once, because loads into the slab's old extent wait for it.
        """
        adapter, now = left.adapter, self._clock.monotonic_s()
        here = self.cache.get(adapter.version)
        if slab.source == FROM_CACHE and here is not None:
            reload_s = here.reload_s
        else:
            source = FROM_STORE if slab.source == FROM_CACHE else slab.source
            reload_s = self._speeds.predict(source, adapter.slab_bytes)
        offset = self.cache.offer(adapter, slab.header, reload_s, now)
        if offset is None:
            return None
        end = left.offset_bytes + adapter.slab_bytes
        self._saves[adapter.version] = _Save(left.offset_bytes, end, asyncio.Event())
        return self._save(left, offset)

    async def wait_saved(self, offset_bytes: int, length_bytes: int) -> None:
        """Wait until all copies from this range of the pool have finished. Loads call this before they write to it."""
        end = offset_bytes + length_bytes
        for save in [save for save in self._saves.values() if save.start < end and offset_bytes < save.end]:
            await save.finished.wait()

    async def find(self, adapter: AdapterRef) -> CacheSource | None:
        """Return a source for the adapter; None if it is not cached. If it is being saved, wait for the copy first."""
        if adapter.version in self._saves:
            await self._saves[adapter.version].finished.wait()
        if adapter.version not in self.cache.versions or self.memory is None:
            return None
        return CacheSource(self.cache, self.memory, self._clock)

    async def check_copy(self, version: str) -> int | None:
        """Verify a cached slab and drop it if it is damaged. Return the first damaged layer, or None."""
        slab, memory = self.cache.begin_read(version), self.memory
        if slab is None or memory is None:
            return None
        layer: int | None = None
        try:
            layers = range(slab.header.shape.layers)
            check = partial(find_damaged_layer, memory, slab.header, slab.offset_bytes, layers)
            layer = await run_in_thread(self._thread, check)
        finally:
            self.cache.end_read(slab)
        if layer is not None:
            self.cache.damage(version, self._clock.monotonic_s())
            self._log.error("cached_slab_damaged", adapter=slab.adapter.name, version=version, layer=layer)
        return layer

    def validate(self) -> None:
        """Raise AssertionError if the cache is inconsistent, or copies and slabs in state SAVING do not match."""
        self.cache.validate()
        saving = {slab.adapter.version for slab in self.cache.entries() if slab.state is CachedState.SAVING}
        assert saving == self._saves.keys(), "a slab is saving and no copy is under way, or the reverse"

    async def _save(self, left: LeftSlab, offset_bytes: int) -> None:
        version = left.adapter.version
        try:
            assert self.memory is not None, "an extent was given in no memory"
            into = self.memory.view(offset_bytes, left.adapter.slab_bytes)
            await run_in_thread(self._thread, partial(self._pool.read_into, left.offset_bytes, into))
            self.cache.save_done(version, self._clock.monotonic_s())
        except BaseException as error:
            # A lost device is only logged here. The next step or load detects it too and ends the process.
            self.cache.save_failed(version, self._clock.monotonic_s())
            if not isinstance(error, Exception):
                raise
            self._log.warning("adapter_not_cached", adapter=left.adapter.name, reason=repr(error))
        finally:
            self._saves.pop(version).finished.set()
