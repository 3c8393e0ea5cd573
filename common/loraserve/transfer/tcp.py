"""Reads over the bus, from any owner to anybody: the owner answers with frames that lie in its memory."""

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
"""Copied by the event loop in about 0.2 ms. Of 256 KiB to 4 MiB, with 2 to 8 in flight, these measured best over all
sizes; smaller ones pay the two processes' turns too often, larger ones are not copied while the next arrive. A read of
1 MiB is one such turn: about 0.25 ms of it are waking four threads and Python that has left the caches, which neither
several chunks, socket buffers, more I/O threads nor answers that are copied instead of lent made shorter."""
LONGEST_CHUNK_BYTES = 16 << 20
"""A frame is received whole before anybody sees it: this bounds what a peer can make a process hold."""
CHUNKS_IN_FLIGHT = 8
ASK_AGAIN_S = 0.2


READERS = 2
"""Threads that read a region which cannot be sent from where it lies: so many chunks of it are copied at a time."""


class ReadableRegion(Protocol):
    """Memory that the network cannot be given as it is, such as a GPU's."""

    def __len__(self) -> int: ...

    def read_into(self, offset_bytes: int, into: memoryview) -> None:
        """Fill ``into``, which is not empty, with what lies there. Blocks, and may be called from several threads."""
        ...


class TcpExporter:
    """See Exporter; a region is host memory, or can be read. Its process hands every ReadRegion to ``answer``."""

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
        """Answer or refuse a ReadRegion without a copy.

        If the region must be read from a device first, returns an awaitable that sends the answer; awaiting it raises
        if the device is lost.
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
            # It may be withdrawn before this begins, and while it is read.
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
                "size", f"{name} sends at most {LONGEST_CHUNK_BYTES} bytes at once, asked for {request.length_bytes}"
            )
        return region


def _read(region: ReadableRegion, offset_bytes: int, length_bytes: int) -> memoryview:
    data = np.empty(length_bytes, np.uint8).data
    if length_bytes:
        region.read_into(offset_bytes, data)
    return data


class TcpReader:
    """See Reader. A chunk that was lost with a connection is asked for again, for up to ``timeout_s`` a chunk."""

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
            # Over sooner than a task has begun.
            await self._fetch(mine, chunks, memory)
            return
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(min(self._chunks_in_flight, most)):
                    tasks.create_task(self._fetch(mine, chunks, memory))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None

    def close(self) -> None:
        """Nothing of a peer's is held between reads."""

    async def _fetch(
        self, handle: TcpHandle, chunks: Iterator[tuple[int, ByteRange]], target: npt.NDArray[np.uint8]
    ) -> None:
        """The next chunk, until there is none: as many are in flight as run this."""
        for at_bytes, wanted in chunks:
            data = await self._chunk(handle, wanted)
            # Not in a thread: a chunk is short, and so nobody writes once a read was cancelled.
            np.copyto(target[at_bytes : at_bytes + wanted.length_bytes], np.frombuffer(data, np.uint8))
            # Before the next one is asked for, which then arrives where this one lay: in memory that is in use already.
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
            "timeout", f"{_what(handle, wanted)}: not there within {self._timeout_s:g} s; read from another source"
        )

    async def _ask(self, handle: TcpHandle, wanted: ByteRange, timeout_s: float) -> bytes | memoryview | None:
        """None where the owner went away or has only begun to start."""
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
                "size", f"{_what(handle, wanted)}: the answer is of another size or place; read from another source"
            )
        return frames[0]


def _what(handle: TcpHandle, wanted: ByteRange) -> str:
    return describe(handle, f"{wanted.length_bytes} bytes at {wanted.offset_bytes}")
