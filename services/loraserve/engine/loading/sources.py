"""Finds whom an adapter can be read from, and keeps count of what came of it."""

from loraserve.bus.protocol import Bus
from loraserve.clock import Clock
from loraserve.config import Config
from loraserve.engine.host_cache.tier import CacheTier
from loraserve.engine.loading.peers import PeerSource, Readers
from loraserve.engine.loading.source import Source, StoreSource
from loraserve.engine.loading.speeds import FROM_STORE, LinkSpeeds, ReadSource, order_sources
from loraserve.errors import PeerError, RequestTimeoutError
from loraserve.messages import AdapterRef, Copies, FindCopies, Holder
from loraserve.messages.transfer import Abilities

FIND_S = 0.25
"""A monitor that is slower than this is not waited for: the store is always there."""
SILENT_S = 2.0
"""And is not asked again for so long."""


class Sources:
    """``abilities`` are this engine's own; None reads from the store alone, and from ``cache``."""

    def __init__(
        self,
        bus: Bus,
        config: Config,
        clock: Clock,
        readers: Readers,
        abilities: Abilities | None,
        cache: CacheTier | None = None,
    ) -> None:
        self._bus = bus
        self._config = config
        self._clock = clock
        self._readers = readers
        self._abilities = abilities
        self._cache = cache
        self._silent_until_s = 0.0
        self.speeds = LinkSpeeds()

    async def find(self, adapter: AdapterRef) -> list[Source]:
        """In the order in which they should be tried. Where it is in this machine's memory nobody else is asked."""
        cached = await self._cache.source(adapter) if self._cache is not None else None
        if cached is not None:
            return [cached, self._source(FROM_STORE)]
        holders = await self._holders(adapter.version)
        transports = self._config.transfer.transports
        now = self._clock.monotonic_s()
        found = order_sources(holders, self._abilities, transports, self.speeds, adapter.slab_bytes, now)
        return [self._source(way) for way in found]

    def predicted_s(self, source: Source, slab_bytes: int) -> float:
        return self.speeds.predict(source.way, slab_bytes)

    def gone(self, engine: str, incarnation: str) -> None:
        """A peer died."""
        self._readers.forget(engine, incarnation)
        self.speeds.forget_failures(engine)

    def _source(self, way: ReadSource) -> Source:
        if way == FROM_STORE:
            engine = self._config.engine
            return StoreSource(self._bus, engine.load_chunk_bytes, engine.load_timeout_s)
        return PeerSource(self._bus, way, self._readers)

    async def _holders(self, version: str) -> tuple[Holder, ...]:
        now = self._clock.monotonic_s()
        if self._abilities is None or now < self._silent_until_s:
            return ()
        try:
            found = await self._bus.request("monitor", FindCopies(version=version), Copies, FIND_S)
        except (RequestTimeoutError, PeerError):
            self._silent_until_s = now + SILENT_S
            return ()
        return found.holders
