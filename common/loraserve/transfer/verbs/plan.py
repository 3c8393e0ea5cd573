"""Pure logic of the verbs transport: the order of requests, the meaning of errors, and the choice of addresses."""

from collections import deque
from collections.abc import Iterable

from loraserve.transfer.protocol import ByteRange, Code

GID_TYPE = "RoCE v2"
MAPPED_IPV4 = "0000:0000:0000:0000:0000:ffff:"
LINK_LOCAL = "fe80:"
NO_GID = "0000:0000:0000:0000:0000:0000:0000:0000"

FLUSHED = 5
"""Completion status of the requests queued after a failed request. It does not give the reason."""
WITHDRAWN = {9, 10, 11}
SILENT = {12, 13}
LOCAL = {1, 2, 4}


class PieceQueue:
    """Schedules the pieces of concurrent reads round-robin, so that short reads do not wait for long ones.

    At most ``depth`` pieces are in flight. Pieces are numbered from ``first``, and numbers are not reused.
    """

    def __init__(self, depth: int, first: int = 0) -> None:
        self._depth = depth
        self._next_number = first
        self._waiting: dict[int, deque[tuple[int, ByteRange]]] = {}
        self._turn: deque[int] = deque()
        self._in_flight: dict[int, int] = {}
        self._count: dict[int, int] = {}

    def add(self, read: int, pieces: Iterable[tuple[int, ByteRange]]) -> None:
        """Queue a read. ``pieces`` has at least one pair of destination offset and source range."""
        self._waiting[read] = deque(pieces)
        self._count[read] = 0
        self._turn.append(read)

    def next(self) -> tuple[int, int, int, ByteRange] | None:
        """Return (number, read, destination offset, range) of the next piece; None if none may be requested now."""
        if not self._turn or len(self._in_flight) >= self._depth:
            return None
        read = self._turn.popleft()
        at_bytes, wanted = self._waiting[read].popleft()
        if self._waiting[read]:
            self._turn.append(read)
        number = self._next_number
        self._next_number += 1
        self._in_flight[number] = read
        self._count[read] += 1
        return number, read, at_bytes, wanted

    def read_of(self, number: int) -> int | None:
        return self._in_flight.get(number)

    def arrived(self, number: int) -> int | None:
        """Record that a piece has arrived. Return its read if the read is now complete, otherwise None."""
        read = self._in_flight.pop(number)
        self._count[read] -= 1
        return self._complete(read)

    def drop(self, read: int) -> int | None:
        """Cancel the pieces of a read that are not in flight. Return the read if it is now complete, otherwise None."""
        if read not in self._count:
            return None
        self._waiting[read].clear()
        if read in self._turn:
            self._turn.remove(read)
        return self._complete(read)

    @property
    def idle(self) -> bool:
        return not self._count

    def validate(self) -> None:
        assert len(self._in_flight) <= self._depth
        assert set(self._turn) == {read for read, pieces in self._waiting.items() if pieces}
        assert len(set(self._turn)) == len(self._turn)
        assert self._count.keys() == self._waiting.keys()
        for read, count in self._count.items():
            assert count == sum(each == read for each in self._in_flight.values())
            assert count or self._waiting[read], "a complete read is still queued"

    def _complete(self, read: int) -> int | None:
        if self._waiting[read] or self._count[read]:
            return None
        del self._waiting[read], self._count[read]
        return read


def failure(status: int) -> tuple[Code, str]:
    """Return the error code and message for a failed completion's status."""
    if status in WITHDRAWN:
        return "gone", "the owner does not offer this memory under this key; read from another source"
    if status in SILENT:
        return "gone", "the owner does not answer; read from another source"
    if status in LOCAL:
        return "refused", "this process's own buffer cannot be written to; read from another source"
    return "refused", "the queue pair failed; read from another source"


def concerns_one(status: int) -> bool:
    """Return whether ``status`` blames only the failed read, so that others on the connection may be retried."""
    return status in WITHDRAWN or status in LOCAL


def best_gid(offered: Iterable[tuple[int, str, str]]) -> tuple[int, str] | None:
    """Return (index, address) of the best of the ``offered`` GIDs (index, address, type); None if there is none."""

    def preference(one: tuple[int, str, str]) -> tuple[bool, bool, bool, int]:
        index, gid, kind = one
        return kind != GID_TYPE, not gid.startswith(MAPPED_IPV4), gid.startswith(LINK_LOCAL), index

    found = sorted((one for one in offered if one[1] != NO_GID), key=preference)
    return found[0][:2] if found else None
