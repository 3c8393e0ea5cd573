"""The host cache as a source: a slab that left the pool a while ago goes back there."""

from loraserve.adapter.format import SlabHeader
from loraserve.clock import Clock
from loraserve.engine.host_cache import CachedSlab, HostCache
from loraserve.engine.landing import Landing
from loraserve.engine.link_speeds import Way
from loraserve.engine.pool_memory import HostPool
from loraserve.engine.source import Damaged, LoadFailed
from loraserve.messages import AdapterRef

FROM_CACHE = Way("cache", "memory")
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
