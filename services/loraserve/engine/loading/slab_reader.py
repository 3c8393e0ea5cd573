"""Reads a slab from the best source into an extent and verifies it.

After a source that fails, or whose bytes are wrong, the next source is tried; beside a source that takes much longer
than predicted another one is tried (a hedge). Everything that arrives is verified against the version before it is
used: the header at once, each layer in a thread, on a device while the layers behind it are still arriving.
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
from loraserve.engine.adapters.lifecycle import LoadedSlab
from loraserve.engine.compute.protocol import DeviceLostError
from loraserve.engine.loading.memory import HostPool, PoolMemory, TransferTarget
from loraserve.engine.loading.source import DamagedSlabError, SlabReadError, SlabSource
from loraserve.engine.loading.sources import SourceFinder
from loraserve.engine.loading.speeds import FROM_STORE, ReadSource, ReadTally, SharedLink, hedge_after_s
from loraserve.engine.schedule.early import remaining_read_s
from loraserve.log import get_logger
from loraserve.messages import AdapterRef, ReadCounts
from loraserve.threads import run_in_thread, wait_finished

ASK_AGAIN_S = 0.2
HEDGE_PIECE_BYTES = 8 << 20
WRITERS = 4
"""Reads that write to a device at the same time, one piece each; others wait for their turn."""


class ReadProgress(Protocol):
    """Follows the reads of one slab into its extent, one after another."""

    def begin(self, header: SlabHeader) -> None:
        """Begin a read, whose bytes overwrite those of the read before."""
        ...

    def advance(self, slab_bytes: int, remaining_s: float) -> None:
        """Note that the first ``slab_bytes`` have arrived; all are expected to be verified in ``remaining_s``."""
        ...

    def abandon(self) -> None: ...


class LayersToVerify:
    """Tells which layers to verify as the bytes of a slab arrive in order; each layer is told once.

    Where the pool is on a device a layer is verified as soon as it is complete. In this machine's memory all layers are
    verified when the last byte has arrived: there steps compute on the cores, and verifying beside the copy made the
    longest step of a load 2.05 median steps instead of 1.8, for a load that took a seventh less (rank 64, SmolLM2-135M,
    Intel Xeon, 2 cores).
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
    """Return the layers in order as at most ``threads`` pieces, none of them empty."""
    each = max(1, -(-len(layers) // threads))
    return [layers[start : start + each] for start in range(0, len(layers), each)]


def find_damaged_layer(memory: PoolMemory, header: SlabHeader, offset_bytes: int, layers: Iterable[int]) -> int | None:
    """Return the first of ``layers`` whose bytes in memory do not have the digest of the header; None if all do.

    The slab begins at ``offset_bytes``. The memory itself is read, so that damage after the transfer is found too.
    """
    for layer in layers:
        part = header.layer(layer)
        digest = blake3()
        memory.digest(digest, offset_bytes + part.start, len(part))
        if digest.digest() != header.layer_digests[layer]:
            return layer
    return None


class SlabReader:
    """Reads slabs into the pool, bounded in time, memory and threads; learns the speed of each source."""

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
        # Apart from the writers: a piece that waited for digests would hold up the layers behind it.
        self._digesters = ThreadPoolExecutor(digest_threads, thread_name_prefix="digest")
        self._log = get_logger(__name__)

    def close(self) -> None:
        for threads in (self._writers, self._digesters):
            threads.shutdown(wait=True, cancel_futures=True)

    def counts(self) -> tuple[ReadCounts, ...]:
        """Return how many slabs were read from each source, and how many reads failed."""
        return self._tally.counts(self._speeds)

    async def read(self, adapter: AdapterRef, offset_bytes: int, progress: ReadProgress | None = None) -> LoadedSlab:
        """Read a slab to ``offset_bytes`` of the pool. A store that restarts is asked again until the deadline.

        ``progress`` follows the reads into the extent; if the slab came from a hedge, the last call is ``abandon``.

        Raises SlabReadError; the content of the extent is then undefined, and nothing writes to it any more.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                while True:
                    sources = await self._sources.find(adapter)
                    try:
                        return await self._read_from_any(adapter, offset_bytes, sources, progress)
                    except SlabReadError as error:
                        if not error.is_temporary:
                            raise
                    await asyncio.sleep(ASK_AGAIN_S)
        except TimeoutError as error:
            message = f"neither a peer nor the store sent all of it within {self._timeout_s:g} s"
            raise SlabReadError("timeout", message) from error

    async def find_damage(self, header: SlabHeader, offset_bytes: int) -> int | None:
        """Return the first layer of a slab in the pool that does not have its digest; None if all have."""
        return await self._find_damage(self._pool, header, offset_bytes, range(header.shape.layers))

    async def _read_from_any(
        self, adapter: AdapterRef, offset_bytes: int, sources: Sequence[SlabSource], progress: ReadProgress | None
    ) -> LoadedSlab:
        """Try the sources in order. If all fail, the store's failure is raised, as it has every adapter."""
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
        """Read from ``source``, and from ``spare`` too if that takes much longer than predicted."""
        first = asyncio.ensure_future(self._read_once(adapter, self._pool, offset_bytes, source, progress))
        try:
            if spare is not None:
                patience_s = hedge_after_s(self._speeds.predict(source.source, adapter.slab_bytes))
                await asyncio.wait([first], timeout=patience_s)
                while self._hedging and not first.done():
                    # Another load hedges, whose memory is all there is for that; this load is next.
                    await asyncio.wait([first], timeout=ASK_AGAIN_S)
            if spare is None or first.done():
                return await first
            return await self._race(adapter, offset_bytes, first, spare)
        finally:
            await _give_up(first)

    async def _race(
        self, adapter: AdapterRef, offset_bytes: int, first: "asyncio.Future[LoadedSlab]", spare: SlabSource
    ) -> LoadedSlab:
        """Read from ``spare`` into memory of its own beside the first read; one load at a time, to bound the memory."""
        self._log.info("load_hedged", adapter=adapter.name, spare=spare.source.name, transport=spare.source.transport)
        # Nothing is zeroed: for 256 MiB that would hold up the event loop for a tenth of a second and more.
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
                # The first had failed before: its own failure is reported.
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
        """Read from one source. Raises SlabReadError, which is counted; nothing writes to the extent afterwards."""
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
        """Copy a slab into its extent and verify its layers in threads. The first failure ends all of it."""
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

    A task that fails while it is cancelled raises the failure alone, and a deadline cancels only once.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def _give_up(read: "asyncio.Future[LoadedSlab]") -> None:
    """Cancel a read unless it has ended. Nothing writes to its memory afterwards."""
    read.cancel()
    if await wait_finished(read):
        # The whole load was cancelled meanwhile.
        raise asyncio.CancelledError
