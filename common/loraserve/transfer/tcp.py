"""Reads over the bus, from any owner to anybody: the owner answers with frames that lie in its memory."""

import asyncio
import secrets
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from loraserve.bus.protocol import Bus, Envelope
from loraserve.errors import PeerError, RequestTimeout
from loraserve.messages import ReadRegion, RegionChunk
from loraserve.transfer.protocol import (
    PROTOCOL,
    Handle,
    Range,
    TcpHandle,
    TransferError,
    asked,
    check_protocol,
    check_ranges,
    checked,
    known_code,
    pieces,
    withdrawn,
)

CHUNK_BYTES = 2 << 20
"""Copied by the event loop in about 0.2 ms. Of 256 KiB to 4 MiB, with 2 to 8 in flight, these measured best over all
sizes; smaller ones pay the two processes' turns too often, larger ones are not copied while the next arrive."""
LONGEST_CHUNK_BYTES = 16 << 20
"""A frame is received whole before anybody sees it: this bounds what a peer can make a process hold."""
CHUNKS_IN_FLIGHT = 8
ASK_AGAIN_S = 0.2


class TcpExporter:
    """See Exporter; a region is host memory. Its process hands every ReadRegion it receives to ``answer``."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._regions: dict[str, tuple[TcpHandle, memoryview]] = {}

    def register(self, region: memoryview) -> TcpHandle:
        handle = TcpHandle(
            protocol=PROTOCOL,
            owner=self._bus.name,
            incarnation=self._bus.incarnation,
            length_bytes=region.nbytes,
            token=secrets.token_hex(16),
        )
        self._regions[handle.token] = handle, region.toreadonly().cast("B")
        return handle

    def answer(self, envelope: Envelope) -> None:
        """Quick and without a copy; what cannot be answered is refused."""
        request: ReadRegion = envelope.message
        try:
            data = self._chunk(request)
        except TransferError as error:
            self._bus.refuse(envelope, error.code, error.message)
        else:
            self._bus.respond(envelope, RegionChunk(token=request.token, offset_bytes=request.offset_bytes), [data])

    def close(self) -> None:
        self._regions.clear()

    def _chunk(self, request: ReadRegion) -> memoryview:
        name = self._bus.name
        check_protocol(name, request.protocol)
        if request.token not in self._regions:
            raise withdrawn(name)
        handle, region = self._regions[request.token]
        check_ranges(handle, [Range(request.offset_bytes, request.length_bytes)])
        if request.length_bytes > LONGEST_CHUNK_BYTES:
            raise TransferError(
                "size", f"{name} sends at most {LONGEST_CHUNK_BYTES} bytes at once, asked for {request.length_bytes}"
            )
        return region[request.offset_bytes : request.offset_bytes + request.length_bytes]


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

    async def read(self, handle: Handle, ranges: Sequence[Range], into: memoryview) -> None:
        mine, target = checked(handle, TcpHandle, ranges, into)
        chunks = pieces(ranges, self._chunk_bytes)
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(self._chunks_in_flight):
                    tasks.create_task(self._fetch(mine, chunks, np.frombuffer(target, np.uint8)))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None

    def close(self) -> None:
        """Nothing of a peer's is held between reads."""

    async def _fetch(
        self, handle: TcpHandle, chunks: Iterator[tuple[int, Range]], target: npt.NDArray[np.uint8]
    ) -> None:
        """The next chunk, until there is none: as many are in flight as run this."""
        for at_bytes, wanted in chunks:
            data = await self._chunk(handle, wanted)
            # Not in a thread: a chunk is short, and so nobody writes once a read was cancelled.
            np.copyto(target[at_bytes : at_bytes + wanted.length_bytes], np.frombuffer(data, np.uint8))

    async def _chunk(self, handle: TcpHandle, wanted: Range) -> bytes | memoryview:
        what = asked(handle, f"{wanted.length_bytes} bytes at {wanted.offset_bytes}")
        try:
            async with asyncio.timeout(self._timeout_s):
                while True:
                    data = await self._ask(handle, wanted, what)
                    if data is not None:
                        return data
                    await asyncio.sleep(ASK_AGAIN_S)
        except TimeoutError as error:
            raise TransferError(
                "timeout", f"{what}: not there within {self._timeout_s:g} s; read from another source"
            ) from error

    async def _ask(self, handle: TcpHandle, wanted: Range, what: str) -> bytes | memoryview | None:
        """None where the owner went away or has only begun to start."""
        request = ReadRegion(
            protocol=PROTOCOL,
            token=handle.token,
            offset_bytes=wanted.offset_bytes,
            length_bytes=wanted.length_bytes,
        )
        try:
            answer, frames = await self._bus.request_frames(handle.owner, request, RegionChunk, self._timeout_s)
        except RequestTimeout:
            return None
        except PeerError as error:
            if error.code == "starting":
                return None
            raise TransferError(known_code(error.code), f"{what}: {error.message}") from error
        if answer.offset_bytes != wanted.offset_bytes or [len(frame) for frame in frames] != [wanted.length_bytes]:
            raise TransferError("size", f"{what}: the answer is of another size or place; read from another source")
        return frames[0]
