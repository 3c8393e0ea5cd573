"""Fills an extent of the pool with an adapter's slab while steps run.

Today the source is the store. What arrives is verified against the version before anyone computes with it.
"""

import asyncio
import hashlib
import time
from collections import deque

import msgspec
import numpy as np

from loraserve.adapter.format import SlabHeader, decode_header, encode_header
from loraserve.bus.protocol import Bus
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

    def __init__(self, bus: Bus, pool: memoryview, chunk_bytes: int, timeout_s: float) -> None:
        self._bus = bus
        self._pool = pool
        self._chunk_bytes = chunk_bytes
        self._timeout_s = timeout_s

    async def load(self, adapter: AdapterRef, offset_bytes: int) -> Loaded:
        """Copy the slab to ``offset_bytes`` of the pool; a store that is restarted meanwhile is asked again.

        Raises LoadFailed; the extent's content is then undefined.
        """
        extent = self._pool[offset_bytes : offset_bytes + adapter.slab_bytes]
        try:
            async with asyncio.timeout(self._timeout_s):
                while True:
                    loaded = await self._try(adapter, extent)
                    if loaded is not None:
                        return loaded
                    await asyncio.sleep(ASK_AGAIN_S)
        except TimeoutError as error:
            raise LoadFailed("timeout", f"the store did not send all of it within {self._timeout_s:g} s") from error
        except PeerError as error:
            raise LoadFailed(error.code, error.message) from error

    async def _try(self, adapter: AdapterRef, extent: memoryview) -> Loaded | None:
        """None where the store went away or has only begun to start."""
        started_s = time.monotonic()
        try:
            header = await self._open(adapter)
            await self._copy(adapter.version, extent)
        except RequestTimeout:
            return None
        except PeerError as error:
            if error.code == "starting":
                return None
            raise
        await self._verify(adapter, header, extent)
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

    async def _copy(self, version: str, extent: memoryview) -> None:
        """Chunks in order, a few in flight. A failing chunk ends the whole: the others are cancelled."""
        waiting: deque[tuple[int, asyncio.Task[memoryview | bytes]]] = deque()
        starts = iter(range(0, len(extent), self._chunk_bytes))
        try:
            while True:
                while len(waiting) < CHUNKS_IN_FLIGHT and (start := next(starts, None)) is not None:
                    length = min(self._chunk_bytes, len(extent) - start)
                    waiting.append((start, asyncio.ensure_future(self._read(version, start, length))))
                if not waiting:
                    return
                start, task = waiting.popleft()
                data = await task
                _copy(extent[start : start + len(data)], data)
        finally:
            for _, task in waiting:
                task.cancel()

    async def _read(self, version: str, start: int, length: int) -> memoryview | bytes:
        _, frames = await self._bus.request_frames(
            "store",
            ReadSlab(version=version, offset_bytes=start, length_bytes=length),
            SlabChunk,
            self._timeout_s,
        )
        if len(frames) != 1 or len(frames[0]) != length:
            raise LoadFailed("corrupt", f"asked for {length} bytes at {start}, the answer has another size")
        return frames[0]

    async def _verify(self, adapter: AdapterRef, header: SlabHeader, extent: memoryview) -> None:
        digest = await asyncio.to_thread(_digest, header, extent)
        if digest != adapter.version:
            raise LoadFailed("corrupt", "the slab's digest is not its version; register the adapter again")


def _copy(into: memoryview, data: memoryview | bytes) -> None:
    # numpy copies without the interpreter's lock, which each of a step's kernel calls needs: measured with rank 64,
    # the longest gap between others' tokens is 2.2 steps instead of 3.2.
    np.copyto(np.frombuffer(into, np.uint8), np.frombuffer(data, np.uint8))


def _digest(header: SlabHeader, extent: memoryview) -> str:
    digest = hashlib.sha256(encode_header(header))
    digest.update(extent)
    return digest.hexdigest()
