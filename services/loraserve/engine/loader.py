"""Fills an extent of the pool with an adapter's slab while steps run.

Today the source is the store. What arrives is verified against the version before anyone computes with it: the header
at once, each layer in a thread, on a device as soon as it is there, while those behind it are still on their way.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import msgspec

from loraserve.adapter.format import SlabHeader, decode_header, slab_version
from loraserve.bus.protocol import Bus
from loraserve.engine.layers import Arrivals, damaged_layer, shares
from loraserve.engine.link import SharedLink
from loraserve.engine.pool_memory import Bytes, PoolMemory
from loraserve.errors import PeerError, RequestTimeout
from loraserve.messages import AdapterRef, OpenSlab, ReadSlab, SlabChunk, SlabInfo
from loraserve.threads import in_thread

CHUNKS_IN_FLIGHT = 2
"""One is copied while the next is on its way; more would only hold memory."""
WRITERS = 4
"""Loads that write to a device at the same time, each a chunk; others wait for their turn."""
ASK_AGAIN_S = 0.2


class LoadFailed(Exception):
    """The slab could not be had. ``code`` is ``not_found``, ``timeout``, ``corrupt``, ``mismatch`` or the store's."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class Loaded(msgspec.Struct, frozen=True):
    """A verified slab in its extent, and the seconds that it took, its share of those that other loads took too."""

    header: SlabHeader
    own_s: float


class SlabLoader:
    """Reads slabs from the store straight into the pool's memory, bounded in time, memory and threads."""

    def __init__(self, bus: Bus, pool: PoolMemory, chunk_bytes: int, timeout_s: float, digest_threads: int) -> None:
        self._bus = bus
        self._pool = pool
        self._chunk_bytes = chunk_bytes
        self._timeout_s = timeout_s
        self._digest_threads = digest_threads
        self._link = SharedLink()
        self._writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="write")
        # Not the writers': a chunk that waits for digests would hold up the layers behind it.
        self._digesters = ThreadPoolExecutor(digest_threads, thread_name_prefix="digest")

    def close(self) -> None:
        for threads in (self._writers, self._digesters):
            threads.shutdown(wait=True, cancel_futures=True)

    async def load(self, adapter: AdapterRef, offset_bytes: int) -> Loaded:
        """Copy the slab to ``offset_bytes`` of the pool; a store that is restarted meanwhile is asked again.

        Raises LoadFailed; the extent's content is then undefined, and no thread is at it any more.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                while True:
                    loaded = await self._try(adapter, offset_bytes)
                    if loaded is not None:
                        return loaded
                    await asyncio.sleep(ASK_AGAIN_S)
        except TimeoutError as error:
            raise LoadFailed("timeout", f"the store did not send all of it within {self._timeout_s:g} s") from error
        except PeerError as error:
            raise LoadFailed(error.code, error.message) from error

    async def _try(self, adapter: AdapterRef, offset_bytes: int) -> Loaded | None:
        """None where the store went away or has only begun to start."""
        began = self._link.begin(time.monotonic())
        try:
            header = await self._open(adapter)
            await self._fill(adapter, header, offset_bytes)
        except RequestTimeout:
            return None
        except PeerError as error:
            if error.code == "starting":
                return None
            raise
        finally:
            own_s = self._link.end(began, time.monotonic())
        return Loaded(header, own_s)

    async def _open(self, adapter: AdapterRef) -> SlabHeader:
        info, frames = await self._bus.request_frames(
            "store", OpenSlab(version=adapter.version), SlabInfo, self._timeout_s
        )
        try:
            header = decode_header(bytes(frames[0]))
        except (IndexError, msgspec.DecodeError) as error:
            raise LoadFailed("corrupt", f"the slab's header cannot be read: {error}") from error
        if not info.slab_bytes == header.slab_bytes == adapter.slab_bytes:
            raise LoadFailed(
                "mismatch",
                f"slab_bytes is {adapter.slab_bytes} in the request, {info.slab_bytes} in the store and "
                f"{header.slab_bytes} in the header; register the adapter again",
            )
        if slab_version(header) != adapter.version:
            raise LoadFailed("corrupt", "the slab's header is not what its version names; register the adapter again")
        return header

    async def _fill(self, adapter: AdapterRef, header: SlabHeader, offset_bytes: int) -> None:
        """Copy in one task and check in others. The first that fails ends all, and they are over when this raises."""
        arrivals = Arrivals(header, on_device=self._pool.waits)
        try:
            async with asyncio.TaskGroup() as tasks:

                def copied(slab_bytes: int) -> None:
                    for layers in shares(arrivals.upto(slab_bytes), self._digest_threads):
                        tasks.create_task(self._check(header, offset_bytes, layers))

                tasks.create_task(self._copy(adapter, offset_bytes, copied))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def _copy(self, adapter: AdapterRef, offset_bytes: int, copied: Callable[[int], None]) -> None:
        """Chunks in order, a few in flight; ``copied`` hears how many bytes of the slab are there.

        A failing chunk ends the whole: the others are cancelled.
        """
        waiting: deque[tuple[int, asyncio.Task[Bytes]]] = deque()
        starts = iter(range(0, adapter.slab_bytes, self._chunk_bytes))
        try:
            while True:
                while len(waiting) < CHUNKS_IN_FLIGHT and (start := next(starts, None)) is not None:
                    length = min(self._chunk_bytes, adapter.slab_bytes - start)
                    waiting.append((start, asyncio.ensure_future(self._read(adapter.version, start, length))))
                if not waiting:
                    return
                start, task = waiting.popleft()
                data = await task
                await self._write(offset_bytes + start, data)
                copied(start + len(data))
        finally:
            for _, task in waiting:
                task.cancel()

    async def _write(self, offset_bytes: int, data: Bytes) -> None:
        if self._pool.waits:
            await in_thread(self._writers, partial(self._pool.write, offset_bytes, data))
        else:
            self._pool.write(offset_bytes, data)

    async def _check(self, header: SlabHeader, offset_bytes: int, layers: range) -> None:
        look = partial(damaged_layer, self._pool, header, offset_bytes, layers)
        damaged = await in_thread(self._digesters, look)
        if damaged is not None:
            raise LoadFailed("corrupt", f"layer {damaged} is not what its digest is of; register the adapter again")

    async def _read(self, version: str, start: int, length: int) -> Bytes:
        _, frames = await self._bus.request_frames(
            "store",
            ReadSlab(version=version, offset_bytes=start, length_bytes=length),
            SlabChunk,
            self._timeout_s,
        )
        if len(frames) != 1 or len(frames[0]) != length:
            raise LoadFailed("corrupt", f"asked for {length} bytes at {start}, the answer has another size")
        return frames[0]
