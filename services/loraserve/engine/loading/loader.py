"""Fills an extent of the pool with an adapter's slab while steps run, from wherever it is there soonest.

What fails or mismatches leaves it to the next source, and beside one that takes much longer than expected another is
tried.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import numpy as np

from loraserve.adapter.format import SlabHeader
from loraserve.clock import Clock
from loraserve.engine.compute.protocol import DeviceLostError, Runner
from loraserve.engine.host_cache.tier import CacheTier
from loraserve.engine.lending.lender import Lender
from loraserve.engine.loading.arrival_watch import ArrivalWatch, ArrivalWatches, base_elements
from loraserve.engine.loading.memory import HostPool, Landing, PoolMemory
from loraserve.engine.loading.slab_reader import Loaded, SlabReader, Watch
from loraserve.engine.loading.source import LoadFailed, Source
from loraserve.engine.loading.sources import Sources
from loraserve.engine.loading.speeds import FROM_STORE, hedge_after_s
from loraserve.engine.schedule.events import CANCELLED, AdapterLoaded, AdapterLoadFailed, Event, LoadAdapter
from loraserve.engine.schedule.report import Rates
from loraserve.log import get_logger
from loraserve.messages import AdapterRef, ReadCounts
from loraserve.threads import wait_finished

ASK_AGAIN_S = 0.2
SPARE_PIECE_BYTES = 8 << 20


class SlabLoader:
    """Reads slabs straight into the pool's memory, bounded in time, memory and threads."""

    def __init__(self, sources: Sources, pool: PoolMemory, clock: Clock, timeout_s: float, digest_threads: int) -> None:
        self._sources = sources
        self._pool = pool
        self._timeout_s = timeout_s
        self._reader = SlabReader(sources.speeds, clock, digest_threads)
        self._hedging = False
        self._log = get_logger(__name__)

    def close(self) -> None:
        self._reader.close()

    def counts(self) -> tuple[ReadCounts, ...]:
        """What was read from where so far."""
        return self._reader.tally.counts(self._sources.speeds)

    async def load(self, adapter: AdapterRef, offset_bytes: int, watch: Watch | None = None) -> Loaded:
        """Read the slab to ``offset_bytes`` of the pool; a store that is restarted meanwhile is asked again. ``watch``
        hears of what is read there; where the slab came another way in the end the last it heard is that it is broken.

        Raises LoadFailed; the extent's content is then undefined, and no thread is at it any more.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                while True:
                    sources = await self._sources.find(adapter)
                    try:
                        return await self._from_any(adapter, offset_bytes, sources, watch)
                    except LoadFailed as error:
                        if not error.passing:
                            raise
                    await asyncio.sleep(ASK_AGAIN_S)
        except TimeoutError as error:
            raise LoadFailed(
                "timeout", f"neither a peer nor the store sent all of it within {self._timeout_s:g} s"
            ) from error

    async def damaged_layer(self, header: SlabHeader, offset_bytes: int) -> int | None:
        """The first layer of a resident slab that is not what its digest is of, None where all are."""
        return await self._reader.damaged_layer(self._pool, header, offset_bytes, range(header.shape.layers))

    async def _from_any(
        self, adapter: AdapterRef, offset_bytes: int, sources: Sequence[Source], watch: Watch | None
    ) -> Loaded:
        """One after another. Of several failures it is the store's that is told, which has every adapter there is."""
        rest = deque(sources)
        while True:
            source = rest.popleft()
            spare = next((each for each in rest if each.way.name != source.way.name), None)
            try:
                return await self._read_or_hedge(adapter, offset_bytes, source, spare, watch)
            except LoadFailed as error:
                _stop_if_cancelled()
                if source.way == FROM_STORE:
                    of_store = error
                if not error.of_way:
                    rest = deque(each for each in rest if each.way.name != source.way.name)
                if not rest:
                    raise of_store from None

    async def _read_or_hedge(
        self, adapter: AdapterRef, offset_bytes: int, source: Source, spare: Source | None, watch: Watch | None
    ) -> Loaded:
        first = asyncio.ensure_future(self._reader.read(adapter, self._pool, offset_bytes, source, watch))
        try:
            if spare is not None:
                patience_s = hedge_after_s(self._sources.predicted_s(source, adapter.slab_bytes))
                await asyncio.wait([first], timeout=patience_s)
                while self._hedging and not first.done():
                    # Another load does, whose memory is all there is for that: then it is this one's turn.
                    await asyncio.wait([first], timeout=ASK_AGAIN_S)
            if spare is None or first.done():
                return await first
            return await self._race(adapter, offset_bytes, first, spare)
        finally:
            await _give_up(first)

    async def _race(
        self, adapter: AdapterRef, offset_bytes: int, first: "asyncio.Future[Loaded]", spare: Source
    ) -> Loaded:
        """Another source beside the first, into memory of its own: one at a time, which bounds that memory."""
        self._log.info("load_hedged", adapter=adapter.name, spare=spare.way.name, transport=spare.way.transport)
        # Nothing is zeroed: for 256 MiB that would hold up the event loop for a tenth of a second and more.
        beside = HostPool(np.empty(adapter.slab_bytes, np.uint8).data)
        second = asyncio.ensure_future(self._reader.read(adapter, beside, 0, spare))
        self._hedging = True
        try:
            await asyncio.wait([first, second], return_when=asyncio.FIRST_COMPLETED)
            if (first.done() and first.exception() is None) or (second.done() and second.exception() is not None):
                return await first
            try:
                loaded = await second
            except LoadFailed:
                # The first had failed before: what is told of it is its own failure.
                return await first
            await _give_up(first)
            await self._bring(beside, adapter, loaded.header, offset_bytes)
            return loaded
        finally:
            try:
                await _give_up(second)
            finally:
                self._hedging = False

    async def _bring(self, beside: HostPool, adapter: AdapterRef, header: SlabHeader, offset_bytes: int) -> None:
        async def fetch(start: int, length: int) -> memoryview:
            return beside.view(start, length)

        async def copy(landing: Landing) -> None:
            await landing.stream(SPARE_PIECE_BYTES, fetch)

        await self._reader.fill(adapter, header, self._pool, offset_bytes, copy)


def _stop_if_cancelled() -> None:
    """Tasks that fail while they are cancelled tell of the failure alone, and a deadline cancels but once."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def _give_up(read: "asyncio.Future[Loaded]") -> None:
    """Unless it is over. Afterwards nobody is at its memory any more."""
    read.cancel()
    if await wait_finished(read):
        # The load is given up as well.
        raise asyncio.CancelledError


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
        """To be run. Tells of one load's end, whatever it is. Raises DeviceLostError alone."""
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
        except DeviceLostError as error:
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
            source=loaded.way.name,
            transport=loaded.way.transport,
            took_s=time.monotonic() - started_s,
        )
        self._tell(AdapterLoaded(adapter.version, watch.read if watch is not None else 0))

    async def _filled(self, load: LoadAdapter, watch: ArrivalWatch | None) -> Loaded:
        """The slab of another may be on its way out of the extent still."""
        await self._cache.before_reuse(load.offset_bytes, load.adapter.slab_bytes)
        return await self._loader.load(load.adapter, load.offset_bytes, watch)


T = TypeVar("T")


class CalledOff(Exception):
    """Nobody wants the work any more, and it is over."""


class Cancellable:
    """One piece of work a name at a time: ``expect`` it, ``run`` it in a task of its own, and perhaps ``cancel`` it."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[Any] | None] = {}

    def expect(self, name: str) -> None:
        """Its task is about to begin."""
        self._tasks[name] = None

    def cancel(self, name: str) -> None:
        """``run`` raises CalledOff once the work has ended. Where that has ended already, this changes nothing."""
        task = self._tasks.pop(name, None)
        if task is not None:
            task.cancel()

    async def run(self, name: str, work: Coroutine[Any, Any, T]) -> T:
        """Raises CalledOff; where it is the whole task that is cancelled, CancelledError."""
        task = asyncio.current_task()
        if task is None or name not in self._tasks:
            work.close()
            raise CalledOff(name)
        self._tasks[name] = task
        try:
            return await work
        except asyncio.CancelledError:
            if name in self._tasks:
                raise
            task.uncancel()
            raise CalledOff(name) from None
        finally:
            self._tasks.pop(name, None)
