"""Loads adapters: executes the scheduler's load instructions.

A load passes through five layers. Each layer calls the next one, which returns its result or raises an error:

    Scheduler           LoadAdapter(adapter, slot, offset_bytes)
        |
    1 EngineService     starts a task for the instruction and hands its result to the scheduler
        | load()        returns AdapterLoaded or AdapterLoadFailed
    2 AdapterLoader     chooses the source, verifies the slab and installs it in its slot
        | copy()        raises SlabReadError
    3 SlabSource        CacheSource or StoreSource   or   PeerSource -> PeerTransports -> RegionReader
        | stream()                                                         | read() or read_into()
    4 TransferTarget    writes the bytes in order; calls arrived()         | then arrived()
        | write()                                                          |
    5 PoolMemory        is the pool, in host memory or on a GPU  <---------+

The right branch: a peer's bytes go directly to a pool in host memory, and to a GPU over cuda_ipc and verbs. Otherwise,
and for large reads in pieces, PeerTransports calls `stream` too. In both branches `arrived` tells AdapterLoader how
many bytes are there. AdapterLoader updates `AnnouncedLoad`, so that steps can use the first layers, and verifies what
`LayersToVerify` returns.

`load` calls these methods of AdapterLoader, each indented below its caller. Other methods call none of them.

    load                           installs the slab and returns the result
      _read_unless_cancelled       waits until the extent can be written; returns None if the load was cancelled
        _is_cancelled              looks up the load's state in the pool
        read_slab                  tries the sources in order until one delivers the slab or the deadline passes
          _hedge                   also reads from a second source if the first takes much longer than predicted
            _transfer              reads from one source and learns the source's speed
              _copy_and_verify     copies the bytes and verifies each layer against its digest in a thread
              _count_failure       counts and logs a failed read
            _race                  uses the slab that arrives first
              _transfer            reads from the second source into a buffer
              _copy_and_verify     copies the buffer to the extent if the second source was faster
"""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from loraserve.adapter.format import SlabHeader
from loraserve.config import EngineConfig
from loraserve.engine.adapters.lifecycle import LifecycleState, LoadedSlab
from loraserve.engine.adapters.pool import AdapterPool
from loraserve.engine.compute.protocol import DeviceLostError, Runner
from loraserve.engine.loading.arrival import AnnouncedLoad, ReadAnnouncer, base_elements
from loraserve.engine.loading.memory import (
    HostPool,
    LayersToVerify,
    PoolMemory,
    TransferTarget,
    find_damaged_layer,
    split_layers,
)
from loraserve.engine.loading.sources import DamagedSlabError, SlabCache, SlabReadError, SlabSource, SourceFinder
from loraserve.engine.loading.speeds import FROM_STORE, ReadSource, ReadTally, SharedLink, hedge_after_s
from loraserve.engine.schedule.events import CANCELLED, AdapterLoaded, AdapterLoadFailed, LoadAdapter
from loraserve.log import get_logger
from loraserve.messages import AdapterRef, ReadCounts
from loraserve.threads import run_in_thread, wait_finished

ASK_AGAIN_S = 0.2
HEDGE_PIECE_BYTES = 8 << 20
WRITERS = 4
"""Maximum number of reads that write a piece to a device at the same time."""


class AdapterLoader:
    """Loads adapters into the pool. To cancel a load, set its state in ``pool`` to CANCELLED and call ``cancel``."""

    def __init__(
        self,
        runner: Runner,
        pool: AdapterPool,
        cache: SlabCache,
        sources: SourceFinder,
        announcer: ReadAnnouncer,
        engine: EngineConfig,
    ) -> None:
        self._runner = runner
        self._memory = runner.pool
        self._pool = pool
        self._cache = cache
        self._sources = sources
        self._speeds = sources.speeds
        self._clock = sources.clock
        self._announcer = announcer
        self._timeout_s = engine.load_timeout_s
        self._digest_threads = engine.digest_threads
        self._link = SharedLink()
        self._tally = ReadTally()
        self._hedging = False
        self._tasks: dict[str, asyncio.Task[object]] = {}
        self._writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="write")
        # Separate from the writers, so that writing a piece never waits for digests.
        self._digesters = ThreadPoolExecutor(engine.digest_threads, thread_name_prefix="digest")
        self._log = get_logger(__name__)

    def close(self) -> None:
        for threads in (self._writers, self._digesters):
            threads.shutdown(wait=True, cancel_futures=True)

    def counts(self) -> tuple[ReadCounts, ...]:
        return self._tally.counts(self._speeds)

    async def load(self, load: LoadAdapter) -> AdapterLoaded | AdapterLoadFailed:
        """Execute one load and return its result. Call this in its own task, which ``cancel`` cancels.

        Raises DeviceLostError, and CancelledError if the process shuts down. Other errors are returned.
        """
        adapter = load.adapter
        log = self._log.bind(adapter=adapter.name, version=adapter.version[:12])
        began_s = self._clock.monotonic_s()
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
            took_s=self._clock.monotonic_s() - began_s,
        )
        return AdapterLoaded(adapter.version, announced.read_number if announced is not None else 0, slab)

    def cancel(self, version: str) -> None:
        """Stop a load whose state is CANCELLED. If the load has not begun, it will not read."""
        task = self._tasks.get(version)
        if task is not None:
            task.cancel()

    async def read_slab(
        self, adapter: AdapterRef, offset_bytes: int, announced: AnnouncedLoad | None = None
    ) -> LoadedSlab:
        """Read a slab to ``offset_bytes`` of the pool. If the store is restarting, retry until the deadline.

        Raises SlabReadError: the store's error if all sources fail, or code ``timeout`` at the deadline. The content of
        the extent is then undefined, and nothing writes to it any more.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                while True:
                    sources = await self._sources.find(adapter)
                    while sources:
                        first, *others = sources
                        spare = next((each for each in others if each.source.name != first.source.name), None)
                        try:
                            return await self._hedge(adapter, offset_bytes, first, spare, announced)
                        except SlabReadError as error:
                            _raise_if_cancelled()
                            if first.source == FROM_STORE:
                                store_error = error
                            keeps_peer = error.other_transport
                        sources = [each for each in others if keeps_peer or each.source.name != first.source.name]
                    if not store_error.is_temporary:
                        raise store_error
                    await asyncio.sleep(ASK_AGAIN_S)
        except TimeoutError as error:
            message = f"neither a peer nor the store sent all of it within {self._timeout_s:g} s"
            raise SlabReadError("timeout", message) from error

    async def find_damage(self, header: SlabHeader, offset_bytes: int) -> int | None:
        """Return the first layer of a slab in the pool that does not match its digest; None if all match."""
        check = partial(find_damaged_layer, self._memory, header, offset_bytes, range(header.shape.layers))
        return await run_in_thread(self._digesters, check)

    async def _read_unless_cancelled(self, load: LoadAdapter, announced: AnnouncedLoad | None) -> LoadedSlab | None:
        """Read and return the slab. Return None if the load was cancelled."""
        version = load.adapter.version
        if self._is_cancelled(version):
            return None
        task = asyncio.current_task()
        assert task is not None, "a coroutine runs in a task"
        self._tasks[version] = task
        try:
            # The evicted slab may still be being copied from this extent to the host cache.
            await self._cache.wait_saved(load.offset_bytes, load.adapter.slab_bytes)
            return await self.read_slab(load.adapter, load.offset_bytes, announced)
        except asyncio.CancelledError:
            if not self._is_cancelled(version):
                raise  # The process shuts down.
            task.uncancel()
            return None
        finally:
            del self._tasks[version]

    def _is_cancelled(self, version: str) -> bool:
        return self._pool.state(version) is LifecycleState.CANCELLED

    async def _hedge(
        self,
        adapter: AdapterRef,
        offset_bytes: int,
        source: SlabSource,
        spare: SlabSource | None,
        announced: AnnouncedLoad | None,
    ) -> LoadedSlab:
        """Read from ``source``. If it takes much longer than predicted, also read from ``spare``."""
        first = asyncio.ensure_future(self._transfer(source, adapter, self._memory, offset_bytes, announced))
        try:
            if spare is not None:
                patience_s = hedge_after_s(self._speeds.predict(source.source, adapter.slab_bytes))
                await asyncio.wait([first], timeout=patience_s)
                while self._hedging and not first.done():
                    # Only one load may hedge at a time, to limit memory. Wait for the other load's hedge to end.
                    await asyncio.wait([first], timeout=ASK_AGAIN_S)
            if spare is None or first.done():
                return await first
            return await self._race(adapter, offset_bytes, first, spare)
        finally:
            await _give_up(first)

    async def _race(
        self, adapter: AdapterRef, offset_bytes: int, first: "asyncio.Future[LoadedSlab]", spare: SlabSource
    ) -> LoadedSlab:
        """Also read from ``spare``, into a buffer. Return the slab that arrives first, once it is in the extent."""
        self._log.info("load_hedged", adapter=adapter.name, spare=spare.source.name, transport=spare.source.transport)
        # The memory is not zeroed: for 256 MiB, that would block the event loop for 0.1 s or more.
        spare_buffer = HostPool(np.empty(adapter.slab_bytes, np.uint8).data)
        second = asyncio.ensure_future(self._transfer(spare, adapter, spare_buffer, 0))
        self._hedging = True
        try:
            await asyncio.wait([first, second], return_when=asyncio.FIRST_COMPLETED)
            if (first.done() and first.exception() is None) or (second.done() and second.exception() is not None):
                return await first
            try:
                loaded = await second
            except SlabReadError:
                # Both reads failed: report the first one's error.
                return await first
            await _give_up(first)

            async def fetch(start: int, length: int) -> memoryview:
                return spare_buffer.view(start, length)

            await self._copy_and_verify(
                lambda target: target.stream(HEDGE_PIECE_BYTES, fetch), loaded.header, self._memory, offset_bytes
            )
            return loaded
        finally:
            try:
                await _give_up(second)
            finally:
                self._hedging = False

    async def _transfer(
        self,
        source: SlabSource,
        adapter: AdapterRef,
        memory: PoolMemory,
        offset_bytes: int,
        announced: AnnouncedLoad | None = None,
    ) -> LoadedSlab:
        """Read the slab from one source. Record the source's speed or failure.

        ``announced`` is told when the read begins, when bytes arrive, and if the read fails or is cancelled. Raises
        SlabReadError, after which nothing writes to the extent any more.
        """
        origin = source.source
        began_s = self._clock.monotonic_s()
        began = self._link.begin(began_s)
        self._speeds.begin_read(origin)
        damaged: DamagedSlabError | None = None
        try:
            header = await source.open(adapter)
            if announced is not None:
                announced.begin(header, origin, began_s)
            arrived = announced.arrived if announced is not None else None
            await self._copy_and_verify(partial(source.copy, adapter), header, memory, offset_bytes, arrived)
        except BaseException as error:
            if announced is not None:
                announced.abandon()
            if isinstance(error, DeviceLostError) or not isinstance(error, Exception):
                self._speeds.abandon_read(origin)
                raise
            damaged = error if isinstance(error, DamagedSlabError) else None
            raise self._count_failure(adapter, origin, error) from error
        finally:
            own_s = self._link.end(began, self._clock.monotonic_s())
            source.close(damaged)
        self._speeds.finish_read(origin, adapter.slab_bytes, own_s)
        self._tally.count_read(origin, adapter.slab_bytes)
        return LoadedSlab(header, origin, own_s)

    async def _copy_and_verify(
        self,
        copy: Callable[[TransferTarget], Awaitable[None]],
        header: SlabHeader,
        memory: PoolMemory,
        offset_bytes: int,
        announce: Callable[[int], None] | None = None,
    ) -> None:
        """Copy a slab into its extent and verify its layers in threads. The first error cancels all other work.

        ``announce`` is called with the total number of bytes whenever bytes have arrived.
        """
        layers = LayersToVerify(header, on_device=memory.on_device)

        async def verify(piece: range) -> None:
            check = partial(find_damaged_layer, memory, header, offset_bytes, piece)
            damaged = await run_in_thread(self._digesters, check)
            if damaged is not None:
                raise DamagedSlabError(damaged)

        def arrived(slab_bytes: int) -> None:
            if announce is not None:
                announce(slab_bytes)
            for piece in split_layers(layers.take(slab_bytes), self._digest_threads):
                tasks.create_task(verify(piece))

        try:
            async with asyncio.TaskGroup() as tasks:
                await copy(TransferTarget(memory, offset_bytes, header.slab_bytes, arrived, self._writers))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    def _count_failure(self, adapter: AdapterRef, source: ReadSource, error: Exception) -> SlabReadError:
        """Count and log a failed read. Return the error to raise."""
        known = isinstance(error, SlabReadError)
        failure = error if isinstance(error, SlabReadError) else SlabReadError("internal", f"{source.name}: {error!r}")
        self._sources.avoid(source)
        self._tally.count_failure(source, mismatched=isinstance(error, DamagedSlabError))
        self._log.warning(
            "source_failed",
            adapter=adapter.name,
            version=adapter.version[:12],
            source=source.name,
            transport=source.transport,
            code=failure.code,
            reason=failure.message,
            exc_info=not known,
        )
        return failure


def _raise_if_cancelled() -> None:
    """Raise CancelledError if this task is being cancelled.

    A task that fails while it is being cancelled raises only its own error, and the cancellation would be lost.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def _give_up(read: "asyncio.Future[LoadedSlab]") -> None:
    """Cancel a read and wait until it ends. Afterwards, it writes no memory any more."""
    read.cancel()
    if await wait_finished(read):
        # The whole load was cancelled during the wait.
        raise asyncio.CancelledError
