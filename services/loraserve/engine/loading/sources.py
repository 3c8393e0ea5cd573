"""Finds the sources that an adapter can be read from."""

from loraserve.bus.protocol import Bus
from loraserve.clock import Clock
from loraserve.config import Config
from loraserve.engine.loading.peers import PeerSource, TransportReaders
from loraserve.engine.loading.source import LocalSource, SlabSource, StoreSource
from loraserve.engine.loading.speeds import FROM_STORE, LinkSpeeds, ReadSource, order_sources
from loraserve.errors import PeerError, RequestTimeoutError
from loraserve.messages import AdapterRef, Copies, FindCopies, Holder

FIND_S = 0.25
"""Timeout of a request to the monitor. It is short because the store has every adapter."""
SILENT_S = 2.0
"""After a failed request, the monitor is not asked again for this long."""


class SourceFinder:
    """Finds the sources of an adapter. The monitor names the peers that hold it."""

    def __init__(
        self,
        bus: Bus,
        config: Config,
        clock: Clock,
        speeds: LinkSpeeds,
        readers: TransportReaders,
        cache: LocalSource | None = None,
    ) -> None:
        self.speeds = speeds
        self._bus = bus
        self._config = config
        self._clock = clock
        self._readers = readers
        self._cache = cache
        self._silent_until_s = 0.0

    async def find(self, adapter: AdapterRef) -> list[SlabSource]:
        """Return the sources in the order in which to try them.

        If the host cache has the adapter, these are the cache and the store; otherwise peers and the store.
        """
        cached = await self._cache.find(adapter) if self._cache is not None else None
        if cached is not None:
            return [cached, self._open_source(FROM_STORE)]
        holders = await self._find_holders(adapter.version)
        transports = self._config.transfer.transports
        now = self._clock.monotonic_s()
        mine = self._readers.abilities
        ordered = order_sources(holders, mine, transports, self.speeds, adapter.slab_bytes, now)
        return [self._open_source(source) for source in ordered]

    def forget(self, engine: str, incarnation: str) -> None:
        """Drop the connections to a dead peer and forget its failures."""
        self._readers.forget(engine, incarnation)
        self.speeds.forget_failures(engine)

    def _open_source(self, source: ReadSource) -> SlabSource:
        if source == FROM_STORE:
            engine = self._config.engine
            return StoreSource(self._bus, engine.load_chunk_bytes, engine.load_timeout_s)
        return PeerSource(self._bus, source, self._readers)

    async def _find_holders(self, version: str) -> tuple[Holder, ...]:
        now = self._clock.monotonic_s()
        if self._readers.abilities is None or now < self._silent_until_s:
            return ()
        try:
            copies = await self._bus.request("monitor", FindCopies(version=version), Copies, FIND_S)
        except (RequestTimeoutError, PeerError):
            self._silent_until_s = now + SILENT_S
            return ()
        return copies.holders
