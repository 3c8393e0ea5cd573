"""A reader's connection to one owner. It tracks the reads in flight and fails them if the connection breaks."""

import asyncio
from collections.abc import Iterable
from typing import NamedTuple

from loraserve.messages.transfer import VerbsHandle
from loraserve.transfer.protocol import ByteRange, TransferError, describe, split_ranges
from loraserve.transfer.verbs.device import verbs_errors
from loraserve.transfer.verbs.plan import FLUSHED, PieceQueue, concerns_one, failure
from loraserve.transfer.verbs.queue import QueuePair


class InterruptedReadError(TransferError):
    """The read failed because its connection was closed or another read broke it. The caller may retry it once."""


class ReadDestination(NamedTuple):
    """The destination of a read in registered memory of this process."""

    address: int
    key: int


class _PendingRead(NamedTuple):
    handle: VerbsHandle
    target: ReadDestination
    done: "asyncio.Future[None]"


class ReadConnection:
    """A connection to one owner. Use it from one event loop. Its requests have the numbers from ``number << 32`` on."""

    def __init__(self, queue: QueuePair, depth: int, number: int) -> None:
        self.number = number
        self.broken = False
        self._queue = queue
        self._pieces = PieceQueue(depth, number << 32)
        self._reads: dict[int, _PendingRead] = {}
        self._reads_begun = 0
        self._arrivals = 0

    @property
    def idle(self) -> bool:
        return self._pieces.idle

    async def read(
        self,
        handle: VerbsHandle,
        ranges: Iterable[ByteRange],
        target: ReadDestination,
        piece_bytes: int,
        timeout_s: float,
    ) -> None:
        """Read the ranges. Raises TransferError. Even if cancelled, this ends only when no piece is in flight."""
        if self.broken:
            raise InterruptedReadError("gone", f"{describe(handle, 'a read')}: the connection failed just now")
        number = self._reads_begun
        self._reads_begun += 1
        done = asyncio.get_running_loop().create_future()
        self._reads[number] = _PendingRead(handle, target, done)
        self._pieces.add(number, split_ranges(list(ranges), piece_bytes))
        self._request_pieces()
        await self._wait(number, done, timeout_s)

    def arrived(self, number: int, status: int) -> None:
        read = self._pieces.read_of(number)
        if read is None or self.broken:
            # The completion belongs to a read that already failed with the connection.
            return
        self._arrivals += 1
        if status != 0:
            self._fail(read, status)
            return
        self._finish(self._pieces.arrived(number))
        self._request_pieces()

    def close(self) -> None:
        """Close the connection. Reads in flight fail and write nothing any more."""
        self._end({}, "the connection was closed", InterruptedReadError)

    def give_up(self) -> None:
        """Close the connection because the owner is dead. Reads in flight fail and are not retried."""
        self._end({}, "the owner died; read from another source", TransferError)

    async def _wait(self, number: int, done: "asyncio.Future[None]", timeout_s: float) -> None:
        cancelled = False
        while not done.done():
            before = self._arrivals
            try:
                await asyncio.wait([done], timeout=timeout_s)
            except asyncio.CancelledError:
                cancelled = True
                # Pieces in flight still write to the caller's memory, so wait for the last of them.
                self._finish(self._pieces.drop(number))
                continue
            if not done.done() and self._arrivals == before:
                self._end({}, f"nothing arrived for {timeout_s:g} s; read from another source", TransferError)
        if cancelled:
            done.exception()
            raise asyncio.CancelledError
        done.result()

    def _request_pieces(self) -> None:
        while (piece := self._pieces.next()) is not None:
            number, read, at_bytes, wanted = piece
            handle, target, _ = self._reads[read]
            source = handle.base + wanted.offset_bytes
            try:
                self._queue.read(number, target.address + at_bytes, target.key, source, handle.key, wanted.length_bytes)
            except verbs_errors() as error:
                self._end({}, f"it could not be requested: {error}; read from another source", TransferError)
                return

    def _finish(self, read: int | None) -> None:
        if read is not None and not self.broken:
            self._reads.pop(read).done.set_result(None)

    def _fail(self, read: int, status: int) -> None:
        """Close the connection because a piece of ``read`` failed. The queue pair would fail all later requests."""
        if status == FLUSHED:
            self._end({}, "the connection failed; read from another source", TransferError)
            return
        code, why = failure(status)
        guilty = {read: TransferError(code, f"{describe(self._reads[read].handle, 'a read')}: {why}")}
        self._end(guilty, why, InterruptedReadError if concerns_one(status) else TransferError)

    def _end(self, guilty: dict[int, TransferError], why: str, kind: type[TransferError]) -> None:
        if self.broken:
            return
        self.broken = True
        try:
            self._queue.close()
        finally:
            while self._reads:
                number, read = self._reads.popitem()
                error = guilty.get(number) or kind("gone", f"{describe(read.handle, 'a read')}: {why}")
                read.done.set_exception(error)
