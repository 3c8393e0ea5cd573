"""All by which this engine gets adapters from others, and lets others get them from it."""

from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, closing
from typing import Any

from loraserve.bus.protocol import Bus, Envelope
from loraserve.clock import Clock
from loraserve.config import Config
from loraserve.engine.adapters.pool import AdapterPool
from loraserve.engine.compute.protocol import Runner
from loraserve.engine.host_cache.tier import CacheTier
from loraserve.engine.lending.leases import Reader
from loraserve.engine.lending.lender import Lender
from loraserve.engine.lending.offers import Offers
from loraserve.engine.loading.loader import AdapterLoads, SlabLoader
from loraserve.engine.loading.peers import Readers
from loraserve.engine.loading.sources import Sources
from loraserve.engine.loading.speeds import FROM_STORE, ReadSource
from loraserve.engine.schedule.events import AdapterDamaged, Event, EvictAdapter, LeasesEnded, LoadAdapter
from loraserve.engine.schedule.report import Rates
from loraserve.engine.setup import digest_threads_for, host_cache_bytes
from loraserve.log import get_logger
from loraserve.messages import (
    EngineGone,
    LeaseSlab,
    ReadCounts,
    ReadRegion,
    ReleaseLease,
    RenewLease,
    SlabDamaged,
)
from loraserve.messages.transfer import Abilities

Exchanged = LeaseSlab | RenewLease | ReleaseLease | SlabDamaged | ReadRegion | EngineGone
"""What ``answer`` is for."""


class AdapterExchange:
    """Made in the event loop where the engine starts; registering memory may block. Closed with ``stack``.

    ``tell`` takes events to the scheduler, whose ``pool`` it is; ``spawn`` runs work beside the inbox.
    """

    def __init__(
        self,
        bus: Bus,
        config: Config,
        clock: Clock,
        runner: Runner,
        pool: AdapterPool,
        rates: Rates,
        tell: Callable[[Event], None],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        stack: AsyncExitStack,
    ) -> None:
        self._clock = clock
        self._spawn = spawn
        self._tell = tell
        self._looking: set[str] = set()
        self._pool = pool
        self._log = get_logger(__name__)
        cache_bytes = host_cache_bytes(config, on_device=runner.pool.waits)
        cache = CacheTier(cache_bytes, runner.pool, clock, spawn, self._predicted_s)
        self._cache = stack.enter_context(closing(cache))
        self._offers = stack.enter_context(closing(Offers(bus, config, runner.pool, cache.memory)))
        self._lender = Lender(
            bus, config, pool, lambda: tell(LeasesEnded()), lambda version: spawn(self._look_at(version)), cache.cache
        )
        self._lender.offer(self._offers.handles, self._offers.cache_handles)
        readers = stack.enter_context(closing(Readers(bus, runner.pool, self._offers.device)))
        self._sources = Sources(bus, config, clock, readers, self._offers.abilities, cache)
        threads = digest_threads_for(config, on_device=runner.pool.waits)
        loader = SlabLoader(self._sources, runner.pool, clock, config.engine.load_timeout_s, threads)
        self._loader = stack.enter_context(closing(loader))
        self._loads = AdapterLoads(self._loader, runner, self._lender, cache, rates, tell)
        bus.subscribe("monitor", "gone")

    @property
    def abilities(self) -> Abilities:
        """How peers can read from here."""
        return self._offers.abilities

    @property
    def cache_abilities(self) -> Abilities | None:
        """How peers can read from the host cache; None where there is none."""
        return self._offers.cache_abilities

    @property
    def cached(self) -> tuple[str, ...]:
        """What the host cache has."""
        return self._cache.versions

    def reads(self) -> tuple[ReadCounts, ...]:
        """What was read from where so far."""
        return self._loader.counts()

    def answer(self, envelope: Envelope) -> None:
        match envelope.message:
            case ReadRegion():
                reading = self._offers.answer(envelope)
                if reading is not None:
                    self._spawn(reading)
            case EngineGone(engine=engine, incarnation=incarnation):
                self._lender.reader_gone(Reader(engine, incarnation), self._clock.monotonic_s())
                self._offers.forget(engine, incarnation)
                self._sources.gone(engine, incarnation)
            case _:
                self._lender.answer(envelope, self._clock.monotonic_s())

    async def connect(self, envelope: Envelope) -> None:
        """ConnectQueue, which takes a while."""
        await self._offers.connect(envelope)

    def load(self, load: LoadAdapter) -> Coroutine[Any, Any, None]:
        """To be run. Tells of the load's end, whatever it is. Raises DeviceLostError alone."""
        return self._loads.load(load)

    def cancel(self, version: str) -> None:
        """Its load ends soon, and is told of then."""
        self._loads.cancel(version)

    def wanted(self, version: str) -> None:
        """A request for it came: the host cache weighs with that."""
        self._cache.used(version)

    def evicted(self, evicted: EvictAdapter) -> None:
        """Also of one that never was there."""
        header = self._lender.evicted(evicted.version)
        if header is not None and evicted.left is not None:
            self._cache.evicted(evicted.left, header)
        elif header is not None:
            self._cache.dropped(evicted.version)

    def expire(self) -> None:
        """From time to time."""
        self._lender.expire(self._clock.monotonic_s())

    def validate(self) -> None:
        self._lender.validate()
        self._cache.validate()

    def _predicted_s(self, way: ReadSource | None, slab_bytes: int) -> float:
        """To read it as it came last, or from the store."""
        return self._sources.speeds.predict(way or FROM_STORE, slab_bytes)

    async def _look_at(self, version: str) -> None:
        """A reader found it damaged: is it so here, or was it on the way? Many may have found that."""
        if version in self._looking:
            return
        self._looking.add(version)
        try:
            await self._cache.look_at(version)
            await self._look_at_pool(version)
        finally:
            self._looking.remove(version)

    async def _look_at_pool(self, version: str) -> None:
        entry, header = self._pool.get(version), self._lender.header(version)
        if entry is None or header is None:
            return
        layer = await self._loader.damaged_layer(header, entry.offset_bytes)
        after = self._pool.get(version)
        if after is None or after.generation != entry.generation:
            return
        self._log.error("own_copy_looked_at", adapter=entry.adapter.name, version=version, damaged_layer=layer)
        if layer is not None:
            self._tell(AdapterDamaged(version))
