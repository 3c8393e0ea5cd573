"""Engines for copies that no budget asks for. Pure."""

from heapq import heapify, heappop, heappush, heapreplace
from typing import Protocol

import numpy as np

from loraserve.planner.placement.problem import Copies, Floats, Ints, Problem, flat

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


REPLICATE = 0.15
"""Of the planned utilisation: an adapter that brings more has a second copy, so that bursts of it have two ways."""
REPLICATED = 0.05
"""Of the planned utilisation: a second copy goes when the adapter brings less."""
REPLICA_BYTES = 0.25
"""Of one copy of everything: what second copies may take at most."""
HELD_BYTES = 0.25
"""Of every adapter on every engine: with more than this there are no second copies for bursts."""
WORTH_A_COPY = 0.05
"""Of an engine's time: an adapter that takes less needs no second copy, however little the others take."""


class Holdings:
    """``copies`` grow and shrink; of each engine the room left, the utilisation so far and the largest rank are kept.

    ``by_weight``: adapters, hottest first.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.copies: Copies = [()] * len(problem.versions)
        self.extents: list[int] = problem.extents.tolist()
        self.ranks: list[int] = problem.ranks.tolist()
        self.whole: list[float] = problem.whole().tolist()
        self.room: list[int] = problem.room_bytes.tolist()
        self.load = [0.0] * len(problem.engines)
        self.rank = [0] * len(problem.engines)
        self.by_weight: list[int] = np.argsort(-problem.whole(), kind="stable").tolist()
        self._pin()

    def _pin(self) -> None:
        pins = self.problem.pins
        for a in sorted(pins, key=lambda a: (-self.whole[a], a)):
            for e in pins[a]:
                self.put(a, e, 1 / len(pins[a]))

    def put(self, a: int, e: int, share: float = 1.0) -> bool:
        """False where it is already or does not fit."""
        held = self.copies[a]
        if self.room[e] < self.extents[a] or e in held:
            return False
        self.copies[a] = tuple(sorted((*held, e))) if held else self.problem.alone[e]
        self.room[e] -= self.extents[a]
        self.load[e] += self.whole[a] * share
        if self.whole[a] > 0 and self.ranks[a] > self.rank[e]:
            self.rank[e] = self.ranks[a]
        return True

    def put_all(self, adapters: Ints, engines: Ints, shares: Floats) -> None:
        """Copies that are known to fit and not to be there yet, those of one adapter one after another."""
        problem, count = self.problem, len(self.room)
        whole = problem.whole()[adapters]
        self.room = (np.array(self.room) - _sums(engines, problem.extents[adapters], count)).tolist()
        self.load = (np.array(self.load) + np.bincount(engines, whole * shares, count)).tolist()
        rank = np.array(self.rank)
        np.maximum.at(rank, engines[whole > 0], problem.ranks[adapters[whole > 0]])
        self.rank = rank.tolist()
        for a, e in zip(adapters.tolist(), engines.tolist(), strict=True):
            held = self.copies[a]
            self.copies[a] = tuple(sorted((*held, e))) if held else problem.alone[e]

    def stay(self, held: Copies, asked: bool) -> None:
        """What is held, hot first, as far as there is memory; ``asked`` False: only of what is idle and nowhere yet."""
        adapters, engines, counts = flat(held)
        chosen = np.ones(len(adapters), bool)
        if not asked:
            nowhere = np.fromiter((not on for on in self.copies), bool, len(self.copies))
            chosen = (nowhere & (self.problem.whole() <= 0))[adapters]
        if self.problem.pins:
            chosen &= ~np.isin(adapters, list(self.problem.pins))
        adapters, engines = adapters[chosen], engines[chosen]
        if (_sums(engines, self.problem.extents[adapters], len(self.room)) <= np.array(self.room)).all():
            self.put_all(adapters, engines, 1 / counts[adapters])
            return
        left = set(adapters.tolist())
        for a in self.by_weight:
            if a in left:
                for e in held[a]:
                    self.put(a, e, 1 / len(held[a]))

    def complete(self, held: Copies) -> None:
        """A copy of everything that fits, hot first, then the least number of copies.

        Where ``held`` has one already, that one.
        """
        spots, pins = Spots(self), self.problem.pins
        for count in range(1, self.problem.settings.min_copies + 1):
            for a in [a for a in self.by_weight if len(self.copies[a]) < count]:
                if a in pins and self.copies[a]:
                    continue
                if not any(self.put(a, e) for e in held[a]):
                    spots.put(a)

    def replicate(self, utilisation: float, held: Copies) -> None:
        """Second copies of the hot where their rank slows nobody, as far as bytes go; those that are held first."""
        spots, padded = Spots(self), self.problem.padded
        one = sum(self.extents)
        left = min(one * REPLICA_BYTES, one * (HELD_BYTES * len(self.room) - 1))
        left -= sum(self.extents[a] * (len(on) - 1) for a, on in enumerate(self.copies) if len(on) > 1)
        for a in self.by_weight:
            if self.whole[a] < _worth(REPLICATED * utilisation, WORTH_A_COPY / 2):
                break
            if len(self.copies[a]) != 1 or a in self.problem.pins or self.extents[a] > left:
                continue
            near = [e for e in held[a] if not padded or self.rank[e] >= self.ranks[a]]
            new = self.whole[a] >= _worth(REPLICATE * utilisation, WORTH_A_COPY)
            if any(self.put(a, e, 0.0) for e in near) or (new and spots.put(a, only_ranked=True)):
                left -= self.extents[a]

    def drop_surplus(self, utilisation: float) -> None:
        """Copies that the adapter brings too little for; those on the fullest engines go first."""
        for a in [a for a, held in enumerate(self.copies) if len(held) > 1]:
            if a in self.problem.pins:
                continue
            held, whole = list(self.copies[a]), self.whole[a]
            few = whole < _worth(REPLICATED * utilisation, WORTH_A_COPY / 2)
            wanted = max(self.problem.settings.min_copies, 1 if few else 2 + int(whole / utilisation))
            while len(held) > wanted:
                fullest = max(held, key=lambda e: (self.load[e], e))
                held.remove(fullest)
                self.room[fullest] += self.extents[a]
            self.copies[a] = tuple(held) if len(held) > 1 else self.problem.alone[held[0]]


def _worth(planned: float, least: float) -> float:
    return max(planned, least)


def _sums(engines: Ints, values: Ints, count: int) -> Ints:
    """Exact where bytes of whole pools are added: a float64 holds integers up to 2**53."""
    return np.bincount(engines, values, count).astype(np.int64)
