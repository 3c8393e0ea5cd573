"""Reads a slab from one source into an extent, and verifies it.

What arrives is verified against the version before anyone computes with it: the header at once, each layer in a thread,
on a device as soon as it is there, while those behind it are still on their way.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol

import msgspec
from blake3 import blake3

from loraserve.adapter.format import SlabHeader
from loraserve.clock import Clock
from loraserve.engine.compute.protocol import DeviceLostError
from loraserve.engine.loading.memory import Landing, PoolMemory
from loraserve.engine.loading.source import Damaged, LoadFailed, Source
from loraserve.engine.loading.speeds import LinkSpeeds, ReadSource, ReadTally, SharedLink
from loraserve.engine.schedule.early import remaining_read_s
from loraserve.log import get_logger
from loraserve.messages import AdapterRef
from loraserve.threads import run_in_thread

WRITERS = 4
"""Loads that write to a device at the same time, each a piece; others wait for their turn."""


class Watch(Protocol):
    """Follows the reads of one slab into its extent, one after another."""

    def begins(self, header: SlabHeader) -> None:
        """A read does, whose bytes take the place of those that came before."""
        ...

    def landed(self, slab_bytes: int, left_s: float) -> None:
        """So many bytes from the slab's beginning on are there, and all will be, verified, in so many seconds."""
        ...

    def broken(self) -> None:
        """The read that began last has failed or was given up."""
        ...


class Loaded(msgspec.Struct, frozen=True):
    """A verified slab in its extent, and the seconds that it took, its share of those that other loads took too."""

    header: SlabHeader
    own_s: float
    way: ReadSource


class SlabReader:
    """Bounded in threads. What it sees of the sources' ways goes to ``speeds`` and ``tally``."""

    def __init__(self, speeds: LinkSpeeds, clock: Clock, digest_threads: int) -> None:
        self._speeds = speeds
        self._clock = clock
        self._digest_threads = digest_threads
        self._link = SharedLink()
        self._writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="write")
        # Not the writers': a piece that waits for digests would hold up the layers behind it.
        self._digesters = ThreadPoolExecutor(digest_threads, thread_name_prefix="digest")
        self._log = get_logger(__name__)
        self.tally = ReadTally()

    def close(self) -> None:
        for threads in (self._writers, self._digesters):
            threads.shutdown(wait=True, cancel_futures=True)

    async def read(
        self, adapter: AdapterRef, pool: PoolMemory, offset_bytes: int, source: Source, watch: Watch | None = None
    ) -> Loaded:
        """Raises LoadFailed, which is counted. However this ends nobody is at the extent any more."""
        try:
            return await self._read(adapter, pool, offset_bytes, source, watch)
        except BaseException:
            if watch is not None:
                watch.broken()
            raise

    async def _read(
        self, adapter: AdapterRef, pool: PoolMemory, offset_bytes: int, source: Source, watch: Watch | None
    ) -> Loaded:
        way = source.way
        began_s = time.monotonic()
        began = self._link.begin(began_s)
        self._speeds.begin_read(way)
        damaged: Damaged | None = None

        def landed(slab_bytes: int) -> None:
            if watch is not None and slab_bytes:
                expected_s = self._speeds.predict_under_way(way, adapter.slab_bytes)
                share = slab_bytes / adapter.slab_bytes
                watch.landed(slab_bytes, remaining_read_s(expected_s, time.monotonic() - began_s, share))

        try:
            header = await source.open(adapter)
            if watch is not None:
                watch.begins(header)
            await self.fill(adapter, header, pool, offset_bytes, partial(source.copy, adapter), landed)
        except (asyncio.CancelledError, DeviceLostError):
            self._speeds.abandon_read(way)
            raise
        except Exception as error:
            damaged = error if isinstance(error, Damaged) else None
            raise self._failed(adapter, way, error) from error
        finally:
            own_s = self._link.end(began, time.monotonic())
            source.close(damaged)
        self._speeds.finish_read(way, adapter.slab_bytes, own_s)
        self.tally.count_read(way, adapter.slab_bytes)
        return Loaded(header, own_s, way)

    async def fill(
        self,
        adapter: AdapterRef,
        header: SlabHeader,
        pool: PoolMemory,
        offset_bytes: int,
        copy: Callable[[Landing], Awaitable[None]],
        landed: Callable[[int], None] = lambda slab_bytes: None,
    ) -> None:
        """Copy in one task and check in others. The first that fails ends all, and they are over when this raises.

        ``landed`` hears how many bytes are there, whenever there are more.
        """
        arrivals = Arrivals(header, on_device=pool.waits)
        try:
            async with asyncio.TaskGroup() as tasks:

                def arrived(slab_bytes: int) -> None:
                    landed(slab_bytes)
                    for layers in shares(arrivals.upto(slab_bytes), self._digest_threads):
                        tasks.create_task(self._check(pool, header, offset_bytes, layers))

                await copy(Landing(pool, offset_bytes, adapter.slab_bytes, arrived, self._writers))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def damaged_layer(self, pool: PoolMemory, header: SlabHeader, offset_bytes: int, layers: range) -> int | None:
        """The first of them that is not what its digest is of."""
        return await run_in_thread(self._digesters, partial(damaged_layer, pool, header, offset_bytes, layers))

    async def _check(self, pool: PoolMemory, header: SlabHeader, offset_bytes: int, layers: range) -> None:
        damaged = await self.damaged_layer(pool, header, offset_bytes, layers)
        if damaged is not None:
            raise Damaged(damaged)

    def _failed(self, adapter: AdapterRef, way: ReadSource, error: Exception) -> LoadFailed:
        """Counted and logged, with both sides."""
        failed = error if isinstance(error, LoadFailed) else LoadFailed("internal", f"{way.name}: {error!r}")
        self._speeds.fail_read(way, self._clock.monotonic_s())
        self.tally.count_failure(way, mismatched=isinstance(error, Damaged))
        self._log.warning(
            "source_failed",
            adapter=adapter.name,
            version=adapter.version[:12],
            source=way.name,
            transport=way.transport,
            code=failed.code,
            reason=failed.message,
            exc_info=failed is not error,
        )
        return failed


class Arrivals:
    """Tells which layers to verify as the bytes of a slab come in order; each is told once.

    Where the pool is a device's that is as soon as they are whole. In this machine's memory it is when all are: there
    steps compute on the cores, and verifying beside the copy made the longest step of a load 2.05 median ones instead
    of 1.8, for a load that took a seventh less (rank 64, SmolLM2-135M, Intel Xeon, 2 cores).
    """

    def __init__(self, header: SlabHeader, on_device: bool) -> None:
        self._header = header
        self._on_device = on_device
        self._next = 0

    def upto(self, slab_bytes: int) -> range:
        """Layers to verify now that the first ``slab_bytes`` are there."""
        first = self._next
        if self._on_device or slab_bytes == self._header.slab_bytes:
            while self._next < self._header.shape.layers and self._header.layer(self._next).stop <= slab_bytes:
                self._next += 1
        return range(first, self._next)


def shares(layers: range, threads: int) -> Sequence[range]:
    """The layers in order as at most so many pieces, none empty, for as many threads."""
    each = max(1, -(-len(layers) // threads))
    return [layers[start : start + each] for start in range(0, len(layers), each)]


def damaged_layer(pool: PoolMemory, header: SlabHeader, offset_bytes: int, layers: Iterable[int]) -> int | None:
    """The first of ``layers`` whose bytes, as the pool has them, are not those that the header has the digest of.

    The slab begins at ``offset_bytes`` of the pool. Reads the pool, so that no later mishap goes unseen.
    """
    for layer in layers:
        part = header.layer(layer)
        digest = blake3()
        pool.digest(digest, offset_bytes + part.start, len(part))
        if digest.digest() != header.layer_digests[layer]:
            return layer
    return None
