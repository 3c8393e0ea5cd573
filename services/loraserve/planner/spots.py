"""Engines for copies that no budget asks for. Pure."""

from heapq import heapify, heappop, heappush, heapreplace
from typing import Protocol

TRIES = 8
"""Of the least busy engines, before the emptiest is asked."""


class Engines(Protocol):
    """What is asked of and done to engines."""

    @property
    def engines(self) -> int: ...

    @property
    def padded(self) -> bool: ...

    def state(self, e: int) -> tuple[int, float, int]:
        """Room in bytes, utilisation so far, largest rank."""
        ...

    def needs(self, a: int) -> tuple[int, float, int]:
        """Bytes, work, rank of an adapter."""
        ...

    def put(self, a: int, e: int, share: float = 1.0) -> bool:
        """False where it is already or does not fit."""
        ...


class Spots:
    """Engines at a rank that is not lower, where there are such; of these the least busy, or the emptiest."""

    def __init__(self, packer: Engines) -> None:
        self._packer = packer
        self._heaps: dict[tuple[int, bool], list[tuple[float, float, int]]] = {}

    def put(self, a: int, only_ranked: bool = False) -> bool:
        """False where no engine has the memory."""
        _, work, rank = self._packer.needs(a)
        ranks = [rank] if only_ranked and self._packer.padded else [rank, 0] if self._packer.padded else [0]
        # The least busy first where it matters, but not long: the emptiest says at once whether there is any.
        return any((work > 0 and self._put(a, level, True)) or self._put(a, level, False) for level in ranks)

    def _put(self, a: int, rank: int, asked: bool) -> bool:
        heap, extent = self._heap(rank, asked), self._packer.needs(a)[0]
        aside: list[tuple[float, float, int]] = []
        done = False
        while heap and not done and len(aside) < TRIES:
            entry = heap[0]
            now = self._key(entry[2], asked)
            if entry != now:
                heapreplace(heap, now)
                continue
            if not asked and -now[0] < extent:
                break
            done = self._packer.put(a, entry[2])
            if not done:
                aside.append(heappop(heap))
        for entry in aside:
            heappush(heap, entry)
        return done

    def _heap(self, rank: int, asked: bool) -> list[tuple[float, float, int]]:
        if (rank, asked) not in self._heaps:
            able = [e for e in range(self._packer.engines) if self._packer.state(e)[2] >= rank]
            self._heaps[rank, asked] = [self._key(e, asked) for e in able]
            heapify(self._heaps[rank, asked])
        return self._heaps[rank, asked]

    def _key(self, e: int, asked: bool) -> tuple[float, float, int]:
        room, load, _ = self._packer.state(e)
        return (load, -room, e) if asked else (-room, load, e)
