"""Builds the objects that load an engine's adapters and lend them to peers."""

from contextlib import AsyncExitStack, closing
from typing import NamedTuple

from loraserve.engine.adapters.residency import Residency
from loraserve.engine.compute.protocol import Runner
from loraserve.engine.host_cache.cache import HostCache
from loraserve.engine.host_cache.tier import CacheTier
from loraserve.engine.lending.lender import Lender
from loraserve.engine.lending.offers import MemoryOffers
from loraserve.engine.loading.announcements import ReadAnnouncer
from loraserve.engine.loading.loader import AdapterLoader
from loraserve.engine.loading.peers import TransportReaders
from loraserve.engine.loading.slab_reader import SlabReader
from loraserve.engine.loading.sources import SourceFinder
from loraserve.engine.loading.speeds import LinkSpeeds
from loraserve.engine.setup import digest_threads_for, host_cache_bytes
from loraserve.service import Service


class AdapterParts(NamedTuple):
    loader: AdapterLoader
    reader: SlabReader
    sources: SourceFinder
    cache: CacheTier
    offers: MemoryOffers
    lender: Lender


def wire_adapters(
    service: Service, runner: Runner, residency: Residency, announcer: ReadAnnouncer, stack: AsyncExitStack
) -> AdapterParts:
    """Build and connect the objects. ``stack`` closes them.

    Runs in the event loop during the start, and may block it while memory is registered with an RDMA device.
    """
    bus, config, clock = service.bus, service.config, service.clock
    memory, pool, story = runner.pool, residency.pool, residency.story
    speeds = LinkSpeeds()
    cache_bytes = host_cache_bytes(config, on_device=memory.on_device)
    cache = CacheTier(HostCache(cache_bytes, residency.is_ready, story), cache_bytes, memory, clock, speeds)
    stack.enter_context(closing(cache))
    offers = stack.enter_context(closing(MemoryOffers(bus, config, memory, cache.memory)))
    lender = Lender(bus, config, pool, cache, offers, story)
    readers = stack.enter_context(closing(TransportReaders(bus, memory, offers.device, offers.abilities)))
    sources = SourceFinder(bus, config, clock, speeds, readers, cache)
    digest_threads = digest_threads_for(config, on_device=memory.on_device)
    reader = SlabReader(sources, memory, clock, config.engine.load_timeout_s, digest_threads)
    stack.enter_context(closing(reader))
    loader = AdapterLoader(runner, pool, cache, reader, announcer)
    bus.subscribe("monitor", "gone")
    return AdapterParts(loader, reader, sources, cache, offers, lender)
