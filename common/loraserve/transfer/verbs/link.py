"""A reader's connection to one owner: the reads under way over it, and what becomes of them when it fails."""

import asyncio
from collections.abc import Iterable
from typing import NamedTuple

from loraserve.messages.transfer import VerbsHandle
from loraserve.transfer.protocol import ByteRange, TransferError, describe, split_ranges
from loraserve.transfer.verbs.device import verbs_errors
from loraserve.transfer.verbs.plan import FLUSHED, PieceQueue, concerns_one, failure
from loraserve.transfer.verbs.queue import QueuePair


class InterruptedReadError(TransferError):
    """It failed for another's mistake, and may be tried once more."""


class ReadDestination(NamedTuple):
    """Where in registered memory of this process a read goes."""

    address: int
    key: int


class _PendingRead(NamedTuple):
    handle: VerbsHandle
    target: ReadDestination
    over: "asyncio.Future[None]"


class ReadConnection:
    """Used from one event loop; ``number`` is its own, and those of its requests begin at ``number << 32``."""

    def __init__(self, queue: QueuePair, depth: int, number: int) -> None:
        self.number = number
        self.broken = False
        self._queue = queue
        self._turns = PieceQueue(depth, number << 32)
        self._reads: dict[int, _PendingRead] = {}
        self._reads_begun = 0
        self._arrivals = 0

    @property
    def idle(self) -> bool:
        return self._turns.idle

    async def read(
        self,
        handle: VerbsHandle,
        ranges: Iterable[ByteRange],
        target: ReadDestination,
        piece_bytes: int,
        timeout_s: float,
    ) -> None:
        """Ends only once nothing is under way of it, however often this is cancelled. Raises TransferError."""
        if self.broken:
            raise InterruptedReadError("gone", f"{describe(handle, 'a read')}: the connection failed just now")
        me = self._reads_begun
        self._reads_begun += 1
        over = asyncio.get_running_loop().create_future()
        self._reads[me] = _PendingRead(handle, target, over)
        self._turns.add(me, split_ranges(list(ranges), piece_bytes))
        self._ask()
        await self._until(me, over, timeout_s)

    def arrived(self, number: int, status: int) -> None:
        """A request is over."""
        read = self._turns.whose(number)
        if read is None or self.broken:
            # Some that were under way when it broke are told of afterwards; their reads have failed.
            return
        self._arrivals += 1
        if status != 0:
            self._fail(read, status)
            return
        self._finish(self._turns.arrived(number))
        self._ask()

    def close(self) -> None:
        """Nothing is written any more; what was under way fails."""
        self._end({}, "the connection was closed", InterruptedReadError)

    def give_up(self) -> None:
        """The owner is gone: so is what was under way, and nobody need ask again."""
        self._end({}, "it died; read from another source", TransferError)

    async def _until(self, me: int, over: "asyncio.Future[None]", timeout_s: float) -> None:
        cancelled = False
        while not over.done():
            before = self._arrivals
            try:
                await asyncio.wait([over], timeout=timeout_s)
            except asyncio.CancelledError:
                cancelled = True
                # What is asked for already is written; the memory is the caller's again when it has been.
                self._finish(self._turns.drop(me))
                continue
            if not over.done() and self._arrivals == before:
                self._end({}, f"nothing came for {timeout_s:g} s; read from another source", TransferError)
        if cancelled:
            over.exception()
            raise asyncio.CancelledError
        over.result()

    def _ask(self) -> None:
        while (piece := self._turns.next()) is not None:
            number, read, at_bytes, wanted = piece
            handle, target, _ = self._reads[read]
            source = handle.base + wanted.offset_bytes
            try:
                self._queue.ask(number, target.address + at_bytes, target.key, source, handle.key, wanted.length_bytes)
            except verbs_errors() as error:
                self._end({}, f"it could not be asked for: {error}; read from another source", TransferError)
                return

    def _finish(self, read: int | None) -> None:
        if read is not None and not self.broken:
            self._reads.pop(read).over.set_result(None)

    def _fail(self, read: int, status: int) -> None:
        """A queue pair that failed once fails at all that is asked for over it."""
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
                read.over.set_exception(error)
