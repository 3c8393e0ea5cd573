"""Fills an extent of the pool with an adapter's slab while steps run.

Today the source is the store. What arrives is verified against the version before anyone computes with it.
"""

import asyncio
import hashlib
import time
from collections import deque

import msgspec

from loraserve.adapter.format import SlabHeader, decode_header, encode_header
from loraserve.bus.protocol import Bus
from loraserve.engine.pool_memory import Bytes, PoolMemory
from loraserve.errors import PeerError, RequestTimeout
from loraserve.messages import AdapterRef, OpenSlab, ReadSlab, SlabChunk, SlabInfo

CHUNKS_IN_FLIGHT = 2
"""One is copied while the next is on its way; more would only hold memory."""
ASK_AGAIN_S = 0.2


class LoadFailed(Exception):
    """The slab could not be had. ``code`` is ``not_found``, ``timeout``, ``corrupt``, ``mismatch`` or the store's."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class Loaded(msgspec.Struct, frozen=True):
    """A verified slab in its extent, and how fast it came."""

    header: SlabHeader
    bytes_per_s: float


class SlabLoader:
    """Reads slabs from the store straight into the pool's memory, bounded in time and memory."""

    def __init__(self, bus: Bus, pool: PoolMemory, chunk_bytes: int, timeout_s: float) -> None:
        self._bus = bus
        self._pool = pool
        self._chunk_bytes = chunk_bytes
        self._timeout_s = timeout_s

    async def load(self, adapter: AdapterRef, offset_bytes: int) -> Loaded:
        """Copy the slab to ``offset_bytes`` of the pool; a store that is restarted meanwhile is asked again.

        Raises LoadFailed; the extent's content is then undefined.
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
        started_s = time.monotonic()
        try:
            header = await self._open(adapter)
            await self._copy(adapter, offset_bytes)
        except RequestTimeout:
            return None
        except PeerError as error:
            if error.code == "starting":
                return None
            raise
        await asyncio.to_thread(self._verify, adapter, header, offset_bytes)
        return Loaded(header, adapter.slab_bytes / max(time.monotonic() - started_s, 1e-9))

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
        return header

    async def _copy(self, adapter: AdapterRef, offset_bytes: int) -> None:
        """Chunks in order, a few in flight. A failing chunk ends the whole: the others are cancelled."""
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
                await self._write(offset_bytes + start, await task)
        finally:
            for _, task in waiting:
                task.cancel()

    async def _write(self, offset_bytes: int, data: Bytes) -> None:
        if not self._pool.waits:
            self._pool.write(offset_bytes, data)
            return
        writing = asyncio.ensure_future(asyncio.to_thread(self._pool.write, offset_bytes, data))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            # Nothing stops a thread, and the extent may be another's as soon as this load has failed.
            await asyncio.wait([writing])
            raise

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

    def _verify(self, adapter: AdapterRef, header: SlabHeader, offset_bytes: int) -> None:
        digest = hashlib.sha256(encode_header(header))
        self._pool.digest(digest, offset_bytes, adapter.slab_bytes)
        if digest.hexdigest() != adapter.version:
            raise LoadFailed("corrupt", "the slab's digest is not its version; register the adapter again")
