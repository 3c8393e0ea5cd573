"""Transport over the bus, between any two processes. The owner sends host memory as raw frames, without a copy."""

import asyncio
import secrets
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from loraserve.bus.protocol import Bus, Envelope
from loraserve.errors import PeerError, RequestTimeoutError
from loraserve.messages import ReadRegion, RegionChunk
from loraserve.messages.transfer import TRANSFER_PROTOCOL_VERSION, Handle, TcpHandle
from loraserve.threads import run_in_thread
from loraserve.transfer.protocol import (
    ByteRange,
    TransferError,
    check_protocol,
    check_ranges,
    check_read,
    code_of_refusal,
    describe,
    split_ranges,
    withdrawn_error,
)

CHUNK_BYTES = 2 << 20
"""The event loop copies a chunk in about 0.2 ms. These values were the best in measurements of 256 KiB to 4 MiB with 2
to 8 chunks in flight. Smaller chunks need too many round trips; the copy of larger chunks overlaps less with the
arrival of the next."""
LONGEST_CHUNK_BYTES = 16 << 20
"""Frames are received as a whole. This limits the memory that a peer can make a process allocate."""
CHUNKS_IN_FLIGHT = 8
ASK_AGAIN_S = 0.2
READERS = 2
"""Number of threads that copy chunks of a `ReadableRegion`."""


class ReadableRegion(Protocol):
    """Memory, such as a GPU's, that must be copied to host memory before it is sent."""

    def __len__(self) -> int: ...

    def read_into(self, offset_bytes: int, into: memoryview) -> None:
        """Copy the bytes at ``offset_bytes`` into ``into``, which is not empty. Blocks; must be thread-safe."""
        ...


class TcpExporter:
    """The owner's side of tcp. A region is host memory or a ReadableRegion. Pass ReadRegion requests to ``answer``."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._regions: dict[str, tuple[TcpHandle, memoryview | ReadableRegion]] = {}
        self._threads = ThreadPoolExecutor(READERS, thread_name_prefix="tcp")

    def register(self, region: memoryview | ReadableRegion) -> TcpHandle:
        handle = TcpHandle(
            protocol=TRANSFER_PROTOCOL_VERSION,
            owner=self._bus.name,
            incarnation=self._bus.incarnation,
            length_bytes=region.nbytes if isinstance(region, memoryview) else len(region),
            token=secrets.token_hex(16),
        )
        kept = region.toreadonly().cast("B") if isinstance(region, memoryview) else region
        self._regions[handle.token] = handle, kept
        return handle

    def answer(self, envelope: Envelope) -> Coroutine[Any, Any, None] | None:
        """Answer or refuse a ReadRegion request.

        For a ReadableRegion, return a coroutine that sends the answer. The caller must await it in a task. It may raise
        errors of the region's device.
        """
        request: ReadRegion = envelope.message
        try:
            region = self._region(request)
        except TransferError as error:
            self._bus.refuse(envelope, error.code, error.message)
            return None
        if not isinstance(region, memoryview):
            return self._answer_read(envelope, region)
        self._send(envelope, region[request.offset_bytes : request.offset_bytes + request.length_bytes])
        return None

    def close(self) -> None:
        self._regions.clear()
        self._threads.shutdown(wait=True)

    async def _answer_read(self, envelope: Envelope, region: ReadableRegion) -> None:
        request: ReadRegion = envelope.message
        try:
            # The region may be withdrawn before this starts or during the read.
            self._region(request)
            data = await run_in_thread(
                self._threads, partial(_read, region, request.offset_bytes, request.length_bytes)
            )
            self._region(request)
        except TransferError as error:
            self._bus.refuse(envelope, error.code, error.message)
        else:
            self._send(envelope, data)

    def _send(self, envelope: Envelope, data: memoryview) -> None:
        request: ReadRegion = envelope.message
        self._bus.respond(envelope, RegionChunk(token=request.token, offset_bytes=request.offset_bytes), [data])

    def _region(self, request: ReadRegion) -> memoryview | ReadableRegion:
        name = self._bus.name
        check_protocol(name, request.protocol)
        if request.token not in self._regions:
            raise withdrawn_error(name)
        handle, region = self._regions[request.token]
        check_ranges(handle, [ByteRange(request.offset_bytes, request.length_bytes)])
        if request.length_bytes > LONGEST_CHUNK_BYTES:
            raise TransferError(
                "size",
                f"{name} sends at most {LONGEST_CHUNK_BYTES} bytes at once, not {request.length_bytes}",
            )
        return region


def _read(region: ReadableRegion, offset_bytes: int, length_bytes: int) -> memoryview:
    data = np.empty(length_bytes, np.uint8).data
    if length_bytes:
        region.read_into(offset_bytes, data)
    return data


class TcpReader:
    """Reads regions over the bus. Implements `RegionReader`. Repeats a request after a lost connection."""

    def __init__(
        self, bus: Bus, timeout_s: float, chunk_bytes: int = CHUNK_BYTES, chunks_in_flight: int = CHUNKS_IN_FLIGHT
    ) -> None:
        assert 0 < chunk_bytes <= LONGEST_CHUNK_BYTES
        self._bus = bus
        self._timeout_s = timeout_s
        self._chunk_bytes = chunk_bytes
        self._chunks_in_flight = chunks_in_flight

    async def read(self, handle: Handle, ranges: Sequence[ByteRange], into: memoryview) -> None:
        mine, target = check_read(handle, TcpHandle, ranges, into)
        chunks = split_ranges(ranges, self._chunk_bytes)
        memory = np.frombuffer(target, np.uint8)
        most = sum([-(-each.length_bytes // self._chunk_bytes) for each in ranges])
        if most <= 1:
            # This is faster than starting a task.
            await self._fetch(mine, chunks, memory)
            return
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(min(self._chunks_in_flight, most)):
                    tasks.create_task(self._fetch(mine, chunks, memory))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None

    def close(self) -> None:
        """Do nothing: the reader holds no resources between reads."""

    async def _fetch(
        self, handle: TcpHandle, chunks: Iterator[tuple[int, ByteRange]], target: npt.NDArray[np.uint8]
    ) -> None:
        """Fetch chunks until ``chunks`` is exhausted. Concurrent calls share ``chunks``; each has one in flight."""
        for at_bytes, wanted in chunks:
            data = await self._chunk(handle, wanted)
            # Not copied in a thread: the copy is short, and nothing may be written after a cancellation.
            np.copyto(target[at_bytes : at_bytes + wanted.length_bytes], np.frombuffer(data, np.uint8))
            # Free the chunk before the next request, so that the next answer reuses this memory.
            del data

    async def _chunk(self, handle: TcpHandle, wanted: ByteRange) -> bytes | memoryview:
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + self._timeout_s
        while (left_s := deadline_s - loop.time()) > 0:
            data = await self._ask(handle, wanted, left_s)
            if data is not None:
                return data
            await asyncio.sleep(min(ASK_AGAIN_S, left_s))
        raise TransferError(
            "timeout", f"{_what(handle, wanted)}: not received in {self._timeout_s:g} s; read from another source"
        )

    async def _ask(self, handle: TcpHandle, wanted: ByteRange, timeout_s: float) -> bytes | memoryview | None:
        """Request a chunk. Return None after ``timeout_s``, if the connection is lost, or if the owner is starting."""
        request = ReadRegion(
            protocol=TRANSFER_PROTOCOL_VERSION,
            token=handle.token,
            offset_bytes=wanted.offset_bytes,
            length_bytes=wanted.length_bytes,
        )
        try:
            answer, frames = await self._bus.request_frames(handle.owner, request, RegionChunk, timeout_s)
        except RequestTimeoutError:
            return None
        except PeerError as error:
            if error.code == "starting":
                return None
            raise TransferError(code_of_refusal(error.code), f"{_what(handle, wanted)}: {error.message}") from error
        if answer.offset_bytes != wanted.offset_bytes or [len(frame) for frame in frames] != [wanted.length_bytes]:
            raise TransferError(
                "size", f"{_what(handle, wanted)}: the answer has another size or offset; read from another source"
            )
        return frames[0]


def _what(handle: TcpHandle, wanted: ByteRange) -> str:
    return describe(handle, f"{wanted.length_bytes} bytes at {wanted.offset_bytes}")
