"""Carries out the scheduler's loads: slab in, kernels told, scheduler told."""

import time
from collections.abc import Callable, Coroutine
from typing import Any

from loraserve.engine.arrival_watch import ArrivalWatch, ArrivalWatches, base_elements
from loraserve.engine.cache_tier import CacheTier
from loraserve.engine.cancellable import CalledOff, Cancellable
from loraserve.engine.compute.protocol import DeviceLost, Runner
from loraserve.engine.lender import Lender
from loraserve.engine.loader import SlabLoader
from loraserve.engine.schedule.events import CANCELLED, AdapterLoaded, AdapterLoadFailed, Event, LoadAdapter
from loraserve.engine.schedule.report import Rates
from loraserve.engine.slab_reader import Loaded
from loraserve.engine.source import LoadFailed
from loraserve.log import get_logger


class AdapterLoads:
    """``tell`` takes events to the scheduler."""

    def __init__(
        self,
        loader: SlabLoader,
        runner: Runner,
        lender: Lender,
        cache: CacheTier,
        rates: Rates,
        tell: Callable[[Event], None],
    ) -> None:
        self._loader = loader
        self._runner = runner
        self._lender = lender
        self._cache = cache
        self._rates = rates
        self._tell = tell
        self._cancellable = Cancellable()
        self._early = ArrivalWatches(runner, rates, tell)
        self._log = get_logger(__name__)

    def load(self, load: LoadAdapter) -> Coroutine[Any, Any, None]:
        """To be run. Tells of one load's end, whatever it is. Raises DeviceLost alone."""
        self._cancellable.expect(load.adapter.version)
        return self._load(load)

    def cancel(self, version: str) -> None:
        """A load that has not begun never does; of one that has, nobody is at its extent when its end is told."""
        self._cancellable.cancel(version)

    async def _load(self, load: LoadAdapter) -> None:
        adapter = load.adapter
        log = self._log.bind(adapter=adapter.name, version=adapter.version[:12])
        started_s = time.monotonic()
        try:
            watch = self._early.watch(load)
            loaded = await self._cancellable.run(adapter.version, self._filled(load, watch))
            self._runner.install(load.slot, loaded.header, base_elements(load, loaded.header))
        except DeviceLost as error:
            # No step may be there to find out: an engine without residents would refuse adapter after adapter.
            log.critical("device_lost", reason=str(error))
            raise
        except CalledOff:
            log.info("adapter_load_cancelled")
            self._tell(AdapterLoadFailed(adapter.version, CANCELLED, "nobody wants it any more"))
            return
        except Exception as error:
            # Whatever an adapter brings about is its own failure and nobody else's.
            code = error.code if isinstance(error, LoadFailed) else "mismatch"
            log.error("adapter_load_failed", code=code, reason=str(error))
            self._tell(AdapterLoadFailed(adapter.version, code, str(error)))
            return
        self._lender.loaded(adapter.version, loaded.header)
        self._cache.loaded(adapter.version, loaded.way)
        self._rates.load_done(adapter.slab_bytes, loaded.own_s)
        log.info(
            "adapter_loaded",
            rank=adapter.rank,
            bytes=adapter.slab_bytes,
            source=loaded.way.source,
            transport=loaded.way.transport,
            took_s=time.monotonic() - started_s,
        )
        self._tell(AdapterLoaded(adapter.version, watch.read if watch is not None else 0))

    async def _filled(self, load: LoadAdapter, watch: ArrivalWatch | None) -> Loaded:
        """The slab of another may be on its way out of the extent still."""
        await self._cache.before_reuse(load.offset_bytes, load.adapter.slab_bytes)
        return await self._loader.load(load.adapter, load.offset_bytes, watch)
