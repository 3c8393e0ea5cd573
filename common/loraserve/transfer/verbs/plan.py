"""What is asked for next over one queue pair, and what its errors mean: decided without a device."""

from collections import deque
from collections.abc import Iterable

from loraserve.transfer.protocol import ByteRange, Code

GID_TYPE = "RoCE v2"
MAPPED_IPV4 = "0000:0000:0000:0000:0000:ffff:"
LINK_LOCAL = "fe80:"
NO_GID = "0000:0000:0000:0000:0000:0000:0000:0000"

FLUSHED = 5
"""Status of what was queued behind the request that failed; it says nothing of its own."""
WITHDRAWN = {9, 10, 11}
SILENT = {12, 13}
LOCAL = {1, 2, 4}


class PieceQueue:
    """Reads take turns piece by piece, so that a short one does not wait for the rest of a long one.

    At most ``depth`` pieces are under way. Their numbers begin at ``first`` and are never used again.
    """

    def __init__(self, depth: int, first: int = 0) -> None:
        self._depth = depth
        self._next_number = first
        self._waiting: dict[int, deque[tuple[int, ByteRange]]] = {}
        self._turn: deque[int] = deque()
        self._under_way: dict[int, int] = {}
        self._count: dict[int, int] = {}

    def add(self, read: int, pieces: Iterable[tuple[int, ByteRange]]) -> None:
        """At least one piece, each with where it goes."""
        self._waiting[read] = deque(pieces)
        self._count[read] = 0
        self._turn.append(read)

    def next(self) -> tuple[int, int, int, ByteRange] | None:
        """A piece's number, its read, where it goes and what it is; None as long as there is nothing to ask for."""
        if not self._turn or len(self._under_way) >= self._depth:
            return None
        read = self._turn.popleft()
        at_bytes, wanted = self._waiting[read].popleft()
        if self._waiting[read]:
            self._turn.append(read)
        number = self._next_number
        self._next_number += 1
        self._under_way[number] = read
        self._count[read] += 1
        return number, read, at_bytes, wanted

    def whose(self, number: int) -> int | None:
        return self._under_way.get(number)

    def arrived(self, number: int) -> int | None:
        """The read that is over with this piece, if one is."""
        read = self._under_way.pop(number)
        self._count[read] -= 1
        return self._over(read)

    def drop(self, read: int) -> int | None:
        """No more of it is asked for. The read, where that ends it."""
        if read not in self._count:
            return None
        self._waiting[read].clear()
        if read in self._turn:
            self._turn.remove(read)
        return self._over(read)

    @property
    def idle(self) -> bool:
        return not self._count

    def validate(self) -> None:
        assert len(self._under_way) <= self._depth
        assert set(self._turn) == {read for read, pieces in self._waiting.items() if pieces}
        assert len(set(self._turn)) == len(self._turn)
        assert self._count.keys() == self._waiting.keys()
        for read, count in self._count.items():
            assert count == sum(whose == read for whose in self._under_way.values())
            assert count or self._waiting[read], "a read that is over was forgotten"

    def _over(self, read: int) -> int | None:
        if self._waiting[read] or self._count[read]:
            return None
        del self._waiting[read], self._count[read]
        return read


def failure(status: int) -> tuple[Code, str]:
    """What a completion's status says of a read."""
    if status in WITHDRAWN:
        return "gone", "it does not offer this memory, or not under this key; read from another source"
    if status in SILENT:
        return "gone", "it does not answer any more; read from another source"
    if status in LOCAL:
        return "refused", "this process's own memory for it cannot be written to; read from another source"
    return "refused", "the queue pair failed; read from another source"


def concerns_one(status: int) -> bool:
    """Whether only what was asked for is at fault, so that what was asked for beside it may be asked for once more."""
    return status in WITHDRAWN or status in LOCAL


def best_gid(offered: Iterable[tuple[int, str, str]]) -> tuple[int, str] | None:
    """Index and address, of (index, address, type): what is routed over IPv4 first, then what is routed at all."""

    def preference(one: tuple[int, str, str]) -> tuple[bool, bool, bool, int]:
        index, gid, kind = one
        return kind != GID_TYPE, not gid.startswith(MAPPED_IPV4), gid.startswith(LINK_LOCAL), index

    found = sorted((one for one in offered if one[1] != NO_GID), key=preference)
    return found[0][:2] if found else None
