"""Executes the scheduler's load instructions: reads the slab and installs it in its slot."""

import asyncio
import time

from loraserve.engine.adapters.lifecycle import LifecycleState, LoadedSlab
from loraserve.engine.adapters.pool import AdapterPool
from loraserve.engine.compute.protocol import DeviceLostError, Runner
from loraserve.engine.host_cache.tier import CacheTier
from loraserve.engine.loading.announcements import AnnouncedLoad, ReadAnnouncer, base_elements
from loraserve.engine.loading.slab_reader import SlabReader
from loraserve.engine.loading.source import SlabReadError
from loraserve.engine.schedule.events import CANCELLED, AdapterLoaded, AdapterLoadFailed, LoadAdapter
from loraserve.log import get_logger


class AdapterLoader:
    """Loads adapters into the pool. To cancel a load, set its state in ``pool`` to CANCELLED and call ``cancel``."""

    def __init__(
        self, runner: Runner, pool: AdapterPool, cache: CacheTier, reader: SlabReader, announcer: ReadAnnouncer
    ) -> None:
        self._runner = runner
        self._pool = pool
        self._cache = cache
        self._reader = reader
        self._announcer = announcer
        self._tasks: dict[str, asyncio.Task[object]] = {}
        self._log = get_logger(__name__)

    async def load(self, load: LoadAdapter) -> AdapterLoaded | AdapterLoadFailed:
        """Execute one load and return its result. Call this in its own task, which ``cancel`` cancels.

        Raises DeviceLostError, and CancelledError if the process shuts down. Other errors are returned.
        """
        adapter = load.adapter
        log = self._log.bind(adapter=adapter.name, version=adapter.version[:12])
        began_s = time.monotonic()
        announced = self._announcer.follow(load)
        try:
            slab = await self._read_unless_cancelled(load, announced)
            if slab is None:
                log.info("adapter_load_cancelled")
                return AdapterLoadFailed(adapter.version, CANCELLED, "nothing wants the adapter any more")
            self._runner.install(load.slot, slab.header, base_elements(load, slab.header))
        except DeviceLostError as error:
            # Raised, so that the process ends: an idle engine would otherwise fail every load and never restart.
            log.critical("device_lost", reason=str(error))
            raise
        except Exception as error:
            # An error of one adapter must not affect others.
            code = error.code if isinstance(error, SlabReadError) else "mismatch"
            log.error("adapter_load_failed", code=code, reason=str(error))
            return AdapterLoadFailed(adapter.version, code, str(error))
        log.info(
            "adapter_loaded",
            rank=adapter.rank,
            bytes=adapter.slab_bytes,
            source=slab.source.name,
            transport=slab.source.transport,
            took_s=time.monotonic() - began_s,
        )
        return AdapterLoaded(adapter.version, announced.read_number if announced is not None else 0, slab)

    def cancel(self, version: str) -> None:
        """Stop a load whose state is CANCELLED. If the load has not begun, it will not read."""
        task = self._tasks.pop(version, None)
        if task is not None:
            task.cancel()

    async def _read_unless_cancelled(self, load: LoadAdapter, announced: AnnouncedLoad | None) -> LoadedSlab | None:
        """Read and return the slab; return None if the load was cancelled."""
        version = load.adapter.version
        if self._is_cancelled(version):
            return None
        task = asyncio.current_task()
        assert task is not None, "a coroutine runs in a task"
        self._tasks[version] = task
        try:
            # The evicted slab may still be being copied from this extent to the host cache.
            await self._cache.wait_saved(load.offset_bytes, load.adapter.slab_bytes)
            return await self._reader.read(load.adapter, load.offset_bytes, announced)
        except asyncio.CancelledError:
            if version in self._tasks:
                raise  # The process shuts down; cancel() was not called.
            task.uncancel()
            return None
        finally:
            self._tasks.pop(version, None)

    def _is_cancelled(self, version: str) -> bool:
        return self._pool.state(version) is LifecycleState.CANCELLED
