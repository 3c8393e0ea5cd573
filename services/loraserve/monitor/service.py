"""The monitor process: collects the engines' reports and publishes the state of the cluster.

It also tells engines which other engines hold an adapter and which engines died.
"""

import asyncio
import itertools
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from typing import Any

from loraserve.bus.protocol import Bus, Envelope
from loraserve.clock import Clock
from loraserve.config import Config
from loraserve.messages import (
    AdapterRef,
    AnnounceCapabilities,
    ClusterLoad,
    ClusterStatistics,
    Copies,
    EngineCapabilities,
    EngineCounters,
    EngineGone,
    EngineLoad,
    EngineStatistics,
    FindCopies,
    RegistryChanged,
    ToMonitor,
)
from loraserve.monitor.copies import CopyIndex
from loraserve.monitor.demand import DemandWindow
from loraserve.monitor.liveness import Liveness
from loraserve.service import Service


class MonitorService(Service):
    """Publishes ClusterLoad at every interval, and at once if an engine appears, restarts, dies or changes state."""

    inbox = ToMonitor

    def __init__(self, config: Config, bus: Bus, clock: Clock) -> None:
        super().__init__(config, bus, clock)
        self._liveness = Liveness(config.monitor.dead_after_s)
        self._demand = DemandWindow(config.monitor.window_s, config.planner.interval_s)
        self._copies = CopyIndex()
        self._capabilities: dict[str, EngineCapabilities] = {}
        self._counters: dict[str, EngineCounters] = {}
        self._adapters: dict[str, AdapterRef] = {}
        self._alive: dict[str, str] = {}
        """Incarnation of each engine that was alive in the last publication."""
        self._sequence = itertools.count(1)
        self._changed = asyncio.Event()
        self._engines_alive = self.metrics.gauge("engines_alive", "Engines that reported lately")

    async def start(self, stack: AsyncExitStack) -> None:
        self.bus.subscribe("store", "registry")

    def loops(self) -> list[Coroutine[Any, Any, None]]:
        return [self._publish_load(), self._publish_statistics()]

    def ready_detail(self) -> str:
        return f"{len(self._alive)} engines alive"

    async def handle(self, envelope: Envelope) -> None:
        match envelope.message:
            case EngineLoad() as load:
                self._take_load(load, envelope.sender)
            case EngineCapabilities() as capabilities:
                self._capabilities[capabilities.engine] = capabilities
            case EngineStatistics() as statistics:
                self._demand.report(statistics, self.clock.monotonic_s())
                self._counters[statistics.engine] = statistics.counters
            case FindCopies(version=version):
                holders = self._copies.holders(version, envelope.sender)
                self.bus.respond(envelope, Copies(version=version, holders=holders))
            case RegistryChanged(adapters=adapters):
                self._adapters = {adapter.version: adapter for adapter in adapters}

    def _take_load(self, load: EngineLoad, sender: str) -> None:
        """Process an engine's load report. If its capabilities are unknown, drop the report and ask for them."""
        capabilities = self._capabilities.get(load.engine)
        if capabilities is None or capabilities.incarnation != load.incarnation:
            self.bus.send(sender, AnnounceCapabilities())
            return
        now = self.clock.monotonic_s()
        self._copies.report(load, capabilities)
        if self._liveness.report(load, capabilities, now):
            self._changed.set()

    async def _publish_load(self) -> None:
        while True:
            now = self.clock.monotonic_s()
            engines = self._liveness.engines(now)
            self._note_changes({seen.engine: seen.load.incarnation for seen in engines if seen.alive})
            load = ClusterLoad(
                incarnation=self.bus.incarnation,
                sequence=next(self._sequence),
                engines=engines,
                demand=self._demand.demand(now, self._adapters),
            )
            self.bus.publish("load", load)
            self._changed.clear()
            await self._wait_for_change(now)

    async def _publish_statistics(self) -> None:
        while True:
            counters = {engine: self._counters[engine] for engine in self._alive if engine in self._counters}
            self.bus.publish("statistics", ClusterStatistics(engines=counters))
            await asyncio.sleep(self.config.engine.statistics_interval_s)

    async def _wait_for_change(self, now: float) -> None:
        """Wait until an engine changes or dies, but no longer than the publication interval."""
        death_s = self._liveness.next_death_s(now)
        interval_s = self.config.monitor.publish_interval_s
        wait_s = interval_s if death_s is None else min(interval_s, death_s + 0.001)
        try:
            async with asyncio.timeout(wait_s):
                await self._changed.wait()
        except TimeoutError:
            return

    def _note_changes(self, alive: dict[str, str]) -> None:
        """Log engines that appeared or died. Publish EngineGone for each incarnation that died or was restarted."""
        for engine in alive.keys() - self._alive.keys():
            self.log.info("engine_alive", engine=engine)
        for engine in self._alive.keys() - alive.keys():
            self.log.warning("engine_dead", engine=engine, silent_s=self.config.monitor.dead_after_s)
            self._copies.drop(engine)
        for engine, incarnation in self._alive.items():
            if alive.get(engine) != incarnation:
                self.bus.publish("gone", EngineGone(engine=engine, incarnation=incarnation))
        self._alive = alive
        self._engines_alive.set(len(alive))
