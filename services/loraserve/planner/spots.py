"""Engines for copies that no budget asks for. Pure."""

from heapq import heapify, heappop, heappush, heapreplace
from typing import Protocol

from loraserve.planner.problem import Problem

TRIES = 8
"""Of the least busy engines, before the emptiest is asked."""


class Engines(Protocol):
    """By engine its room in bytes, utilisation so far and largest rank; by adapter its bytes, work and rank."""

    problem: Problem
    room: list[int]
    load: list[float]
    rank: list[int]
    extents: list[int]
    whole: list[float]
    ranks: list[int]

    def put(self, a: int, e: int, share: float = 1.0) -> bool:
        """False where it is already or does not fit."""
        ...


class Spots:
    """Engines at a rank that is not lower, where there are such; of these the least busy, or the emptiest."""

    def __init__(self, engines: Engines) -> None:
        self._on = engines
        self._heaps: dict[tuple[int, bool], list[tuple[float, float, int]]] = {}

    def put(self, a: int, only_ranked: bool = False) -> bool:
        """False where no engine has the memory."""
        work, rank = self._on.whole[a], self._on.ranks[a]
        padded = self._on.problem.padded
        ranks = ([rank] if only_ranked else [rank, 0]) if padded else [0]
        # The least busy first where it matters, but not long: the emptiest says at once whether there is any.
        return any((work > 0 and self._put(a, level, True)) or self._put(a, level, False) for level in ranks)

    def _put(self, a: int, rank: int, asked: bool) -> bool:
        heap, extent = self._heap(rank, asked), self._on.extents[a]
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
            done = self._on.put(a, entry[2])
            if not done:
                aside.append(heappop(heap))
        for entry in aside:
            heappush(heap, entry)
        return done

    def _heap(self, rank: int, asked: bool) -> list[tuple[float, float, int]]:
        if (rank, asked) not in self._heaps:
            able = [e for e, largest in enumerate(self._on.rank) if largest >= rank]
            self._heaps[rank, asked] = [self._key(e, asked) for e in able]
            heapify(self._heaps[rank, asked])
        return self._heaps[rank, asked]

    def _key(self, e: int, asked: bool) -> tuple[float, float, int]:
        room, load = self._on.room[e], self._on.load[e]
        return (load, -room, e) if asked else (-room, load, e)
