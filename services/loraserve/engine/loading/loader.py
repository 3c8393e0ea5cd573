"""Reads a slab from the best source into an extent and verifies it.

If a source fails or sends wrong bytes, the next source is tried. If a source takes much longer than predicted, a
second source is read concurrently (a hedge). The header is verified against the version when it arrives. Each layer is
verified in a thread; on a device, this happens while later layers are still arriving.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol

import numpy as np
from blake3 import blake3

from loraserve.adapter.format import SlabHeader
from loraserve.clock import Clock
from loraserve.engine.adapters.lifecycle import LifecycleState, LoadedSlab
from loraserve.engine.adapters.pool import AdapterPool
from loraserve.engine.compute.protocol import DeviceLostError, Runner
from loraserve.engine.loading.arrival import AnnouncedLoad, ReadAnnouncer, base_elements
from loraserve.engine.loading.memory import HostPool, PoolMemory, TransferTarget
from loraserve.engine.loading.sources import DamagedSlabError, SlabCache, SlabReadError, SlabSource, SourceFinder
from loraserve.engine.loading.speeds import FROM_STORE, ReadSource, ReadTally, SharedLink, hedge_after_s
from loraserve.engine.schedule.early import remaining_read_s
from loraserve.engine.schedule.events import CANCELLED, AdapterLoaded, AdapterLoadFailed, LoadAdapter
from loraserve.log import get_logger
from loraserve.messages import AdapterRef, ReadCounts
from loraserve.threads import run_in_thread, wait_finished

ASK_AGAIN_S = 0.2
HEDGE_PIECE_BYTES = 8 << 20
WRITERS = 4
"""Maximum number of reads that write a piece to a device at the same time."""


class ReadProgress(Protocol):
    """Observes the attempts to read one slab into its extent; each attempt with another source is a new read."""

    def begin(self, header: SlabHeader) -> None:
        """Record that a read begins. Its bytes overwrite those of the previous read."""
        ...

    def advance(self, slab_bytes: int, remaining_s: float) -> None:
        """Record that the first ``slab_bytes`` have arrived. The slab should be verified in ``remaining_s`` seconds."""
        ...

    def abandon(self) -> None: ...


class LayersToVerify:
    """Decides which layers to verify as the bytes of a slab arrive in order. Each layer is verified once.

    In a pool on a device, a layer is verified as soon as it is complete. In host memory, all layers are verified after
    the last byte has arrived, because steps compute on the same CPU. Verifying during the copy made loads a seventh
    shorter. But the longest step during a load grew from 1.8 to 2.05 median steps (SmolLM2-135M, rank 64, 2 cores).
    """

    def __init__(self, header: SlabHeader, on_device: bool) -> None:
        self._header = header
        self._on_device = on_device
        self._next = 0

    def take(self, slab_bytes: int) -> range:
        """Return the layers to verify now that the first ``slab_bytes`` have arrived."""
        first = self._next
        if self._on_device or slab_bytes == self._header.slab_bytes:
            while self._next < self._header.shape.layers and self._header.layer(self._next).stop <= slab_bytes:
                self._next += 1
        return range(first, self._next)


def split_layers(layers: range, threads: int) -> Sequence[range]:
    """Split the layers into at most ``threads`` consecutive, non-empty ranges."""
    each = max(1, -(-len(layers) // threads))
    return [layers[start : start + each] for start in range(0, len(layers), each)]


def find_damaged_layer(memory: PoolMemory, header: SlabHeader, offset_bytes: int, layers: Iterable[int]) -> int | None:
    """Return the first of ``layers`` whose bytes in memory do not match the header's digest; None if all match.

    The slab begins at ``offset_bytes`` of the memory.
    """
    for layer in layers:
        part = header.layer(layer)
        digest = blake3()
        memory.digest(digest, offset_bytes + part.start, len(part))
        if digest.digest() != header.layer_digests[layer]:
            return layer
    return None


class SlabReader:
    """Reads slabs into the pool and learns the speed of each source. Time, memory and threads are limited."""

    def __init__(
        self, sources: SourceFinder, pool: PoolMemory, clock: Clock, timeout_s: float, digest_threads: int
    ) -> None:
        self._sources = sources
        self._speeds = sources.speeds
        self._pool = pool
        self._clock = clock
        self._timeout_s = timeout_s
        self._digest_threads = digest_threads
        self._link = SharedLink()
        self._tally = ReadTally()
        self._hedging = False
        self._writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="write")
        # Separate from the writers, so that writing a piece never waits for digests.
        self._digesters = ThreadPoolExecutor(digest_threads, thread_name_prefix="digest")
        self._log = get_logger(__name__)

    def close(self) -> None:
        for threads in (self._writers, self._digesters):
            threads.shutdown(wait=True, cancel_futures=True)

    def counts(self) -> tuple[ReadCounts, ...]:
        """Return how many slabs were read from each source, and how many reads failed."""
        return self._tally.counts(self._speeds)

    async def read(self, adapter: AdapterRef, offset_bytes: int, progress: ReadProgress | None = None) -> LoadedSlab:
        """Read a slab to ``offset_bytes`` of the pool. If the store is restarting, retry until the deadline.

        ``progress`` observes the reads into the extent. If the slab comes from a hedge, the last call is ``abandon``.

        Raises SlabReadError. The content of the extent is then undefined, and nothing writes to it any more.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                while True:
                    sources = await self._sources.find(adapter)
                    try:
                        return await self._try_sources(adapter, offset_bytes, sources, progress)
                    except SlabReadError as error:
                        if not error.is_temporary:
                            raise
                    await asyncio.sleep(ASK_AGAIN_S)
        except TimeoutError as error:
            message = f"neither a peer nor the store sent all of it within {self._timeout_s:g} s"
            raise SlabReadError("timeout", message) from error

    async def find_damage(self, header: SlabHeader, offset_bytes: int) -> int | None:
        """Return the first layer of a slab in the pool that does not match its digest; None if all match."""
        return await self._find_damage(self._pool, header, offset_bytes, range(header.shape.layers))

    async def _try_sources(
        self, adapter: AdapterRef, offset_bytes: int, sources: Sequence[SlabSource], progress: ReadProgress | None
    ) -> LoadedSlab:
        """Try the sources in order. If all fail, raise the store's error, because the store has every adapter."""
        remaining = deque(sources)
        while True:
            first = remaining.popleft()
            spare = next((each for each in remaining if each.source.name != first.source.name), None)
            try:
                return await self._read_hedged(adapter, offset_bytes, first, spare, progress)
            except SlabReadError as error:
                _raise_if_cancelled()
                if first.source == FROM_STORE:
                    from_store = error
                if not error.other_transport:
                    remaining = deque(each for each in remaining if each.source.name != first.source.name)
                if not remaining:
                    raise from_store from None

    async def _read_hedged(
        self,
        adapter: AdapterRef,
        offset_bytes: int,
        source: SlabSource,
        spare: SlabSource | None,
        progress: ReadProgress | None,
    ) -> LoadedSlab:
        """Read from ``source``. If it takes much longer than predicted, also read from ``spare``."""
        first = asyncio.ensure_future(self._read_once(adapter, self._pool, offset_bytes, source, progress))
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
        """Also read from ``spare``, into a separate buffer. Return the slab that arrives first, in the extent."""
        self._log.info("load_hedged", adapter=adapter.name, spare=spare.source.name, transport=spare.source.transport)
        # The memory is not zeroed: for 256 MiB, that would block the event loop for 0.1 s or more.
        beside = HostPool(np.empty(adapter.slab_bytes, np.uint8).data)
        second = asyncio.ensure_future(self._read_once(adapter, beside, 0, spare))
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
            await self._copy_from_hedge(beside, loaded.header, offset_bytes)
            return loaded
        finally:
            try:
                await _give_up(second)
            finally:
                self._hedging = False

    async def _copy_from_hedge(self, beside: HostPool, header: SlabHeader, offset_bytes: int) -> None:
        async def fetch(start: int, length: int) -> memoryview:
            return beside.view(start, length)

        async def copy(target: TransferTarget) -> None:
            await target.stream(HEDGE_PIECE_BYTES, fetch)

        await self._fill(header, self._pool, offset_bytes, copy)

    async def _read_once(
        self,
        adapter: AdapterRef,
        pool: PoolMemory,
        offset_bytes: int,
        source: SlabSource,
        progress: ReadProgress | None = None,
    ) -> LoadedSlab:
        """Read from one source. Raises SlabReadError and counts the failure; then nothing writes to the extent."""
        origin = source.source
        began_s = time.monotonic()
        began = self._link.begin(began_s)
        self._speeds.begin_read(origin)
        damaged: DamagedSlabError | None = None

        def advance(slab_bytes: int) -> None:
            if progress is not None and slab_bytes:
                expected_s = self._speeds.predict_under_way(origin, adapter.slab_bytes)
                fraction = slab_bytes / adapter.slab_bytes
                progress.advance(slab_bytes, remaining_read_s(expected_s, time.monotonic() - began_s, fraction))

        try:
            header = await source.open(adapter)
            if progress is not None:
                progress.begin(header)
            await self._fill(header, pool, offset_bytes, partial(source.copy, adapter), advance)
        except BaseException as error:
            if progress is not None:
                progress.abandon()
            if isinstance(error, DeviceLostError) or not isinstance(error, Exception):
                self._speeds.abandon_read(origin)
                raise
            damaged = error if isinstance(error, DamagedSlabError) else None
            raise self._count_failure(adapter, origin, error) from error
        finally:
            own_s = self._link.end(began, time.monotonic())
            source.close(damaged)
        self._speeds.finish_read(origin, adapter.slab_bytes, own_s)
        self._tally.count_read(origin, adapter.slab_bytes)
        return LoadedSlab(header, origin, own_s)

    async def _fill(
        self,
        header: SlabHeader,
        pool: PoolMemory,
        offset_bytes: int,
        copy: Callable[[TransferTarget], Awaitable[None]],
        advance: Callable[[int], None] = lambda slab_bytes: None,
    ) -> None:
        """Copy a slab into its extent and verify its layers in threads. The first error cancels the rest."""
        layers = LayersToVerify(header, on_device=pool.on_device)
        try:
            async with asyncio.TaskGroup() as tasks:

                def verify_arrived(slab_bytes: int) -> None:
                    advance(slab_bytes)
                    for piece in split_layers(layers.take(slab_bytes), self._digest_threads):
                        tasks.create_task(self._verify(pool, header, offset_bytes, piece))

                await copy(TransferTarget(pool, offset_bytes, header.slab_bytes, verify_arrived, self._writers))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _verify(self, pool: PoolMemory, header: SlabHeader, offset_bytes: int, layers: range) -> None:
        damaged = await self._find_damage(pool, header, offset_bytes, layers)
        if damaged is not None:
            raise DamagedSlabError(damaged)

    async def _find_damage(self, pool: PoolMemory, header: SlabHeader, offset_bytes: int, layers: range) -> int | None:
        return await run_in_thread(self._digesters, partial(find_damaged_layer, pool, header, offset_bytes, layers))

    def _count_failure(self, adapter: AdapterRef, source: ReadSource, error: Exception) -> SlabReadError:
        """Count and log a failed read; return the error to raise."""
        known = isinstance(error, SlabReadError)
        failure = error if isinstance(error, SlabReadError) else SlabReadError("internal", f"{source.name}: {error!r}")
        self._speeds.fail_read(source, self._clock.monotonic_s())
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


class AdapterLoader:
    """Loads adapters into the pool. To cancel a load, set its state in ``pool`` to CANCELLED and call ``cancel``."""

    def __init__(
        self, runner: Runner, pool: AdapterPool, cache: SlabCache, reader: SlabReader, announcer: ReadAnnouncer
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
