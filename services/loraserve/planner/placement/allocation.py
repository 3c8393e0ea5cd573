"""``Allocation`` adds, keeps and drops copies of adapters while a plan is made, within the engines' pool memory."""

from collections.abc import Callable
from heapq import heapify, heappop, heappush, heapreplace

import numpy as np

from loraserve.planner.placement.problem import CopyMap, Floats, Ints, Problem, flatten

REPLICATE_FROM = 0.15
"""Fraction of the planned utilisation from which an adapter gets a second copy, which absorbs its bursts."""
KEEP_REPLICA_FROM = 0.05
"""Fraction of the planned utilisation below which a second copy is dropped."""
REPLICA_BYTES = 0.25
"""Limit of the bytes of additional copies, as a fraction of the bytes of one copy of every adapter."""
MAX_HELD_FRACTION = 0.25
"""Limit of the bytes of all copies, as a fraction of a copy of every adapter on every engine. Limits second copies."""
MIN_REPLICATED_UTILISATION = 0.05
"""Least utilisation of an adapter that gets a second copy, regardless of the planned utilisation."""
TRIES = 8
"""Engines without enough memory after which a search for an engine gives up."""

EngineKey = tuple[float, ...]
"""Order of engines in a search. The last entry is the engine, so that keys are unique."""


class Allocation:
    """The copies of a plan under construction, with the free memory and the load of each engine. Pins are placed first.

    ``copies`` changes in place. ``work``: by adapter, the utilisation that it causes on an engine with no higher rank.
    ``by_work``: the adapters in descending order of work. By engine: ``room`` (free bytes), ``load`` (utilisation:
    the sum of work * share of traffic), and ``max_rank`` (the largest rank with traffic).
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.copies: CopyMap = [()] * len(problem.refs)
        self.extents: list[int] = problem.extents.tolist()
        self.ranks: list[int] = problem.ranks.tolist()
        self.work: list[float] = problem.own_utilisation().tolist()
        self.room: list[int] = problem.room_bytes.tolist()
        self.load = [0.0] * len(problem.engines)
        self.max_rank = [0] * len(problem.engines)
        self.by_work: list[int] = np.argsort(-problem.own_utilisation(), kind="stable").tolist()
        self._partial_shares: dict[tuple[int, int], float] = {}
        """By (adapter, engine), shares of copies that differ from 1."""
        for a in sorted(problem.pins, key=lambda a: (-self.work[a], a)):
            for e in problem.pins[a]:
                self.add(a, e, 1 / len(problem.pins[a]))

    def has_room(self, a: int, e: int) -> bool:
        return self.room[e] >= self.extents[a]

    def add(self, a: int, e: int, share: float = 1.0) -> bool:
        """Add a copy with its share of traffic. Return False if it already exists or does not fit."""
        held = self.copies[a]
        if self.room[e] < self.extents[a] or e in held:
            return False
        self.copies[a] = tuple(sorted((*held, e))) if held else self.problem.single[e]
        self.room[e] -= self.extents[a]
        self.load[e] += self.work[a] * share
        if self.work[a] > 0 and self.ranks[a] > self.max_rank[e]:
            self.max_rank[e] = self.ranks[a]
        if share != 1.0:
            self._partial_shares[a, e] = share
        return True

    def add_all(self, adapters: Ints, engines: Ints, shares: Floats) -> None:
        """Add copies, given as parallel arrays. The caller ensures that they are new and fit."""
        problem, count = self.problem, len(self.room)
        work = problem.own_utilisation()[adapters]
        self.room = (np.array(self.room) - _sum_bytes(engines, problem.extents[adapters], count)).tolist()
        self.load = (np.array(self.load) + np.bincount(engines, work * shares, count)).tolist()
        max_rank = np.array(self.max_rank)
        np.maximum.at(max_rank, engines[work > 0], problem.ranks[adapters[work > 0]])
        self.max_rank = max_rank.tolist()
        for a, e, share in zip(adapters.tolist(), engines.tolist(), shares.tolist(), strict=True):
            held = self.copies[a]
            self.copies[a] = tuple(sorted((*held, e))) if held else problem.single[e]
            if share != 1.0:
                self._partial_shares[a, e] = share

    def keep(self, held: CopyMap, idle_only: bool = False) -> None:
        """Add the copies in ``held`` that fit, except those of pinned adapters. Adapters with most work come first.

        With ``idle_only``, add only copies of adapters that have no traffic and no copy in this plan yet.
        """
        adapters, engines, counts = flatten(held)
        chosen = np.ones(len(adapters), bool)
        if idle_only:
            missing = np.fromiter((not on for on in self.copies), bool, len(self.copies))
            chosen = (missing & (self.problem.own_utilisation() <= 0))[adapters]
        if self.problem.pins:
            chosen &= ~np.isin(adapters, list(self.problem.pins))
        adapters, engines = adapters[chosen], engines[chosen]
        if (_sum_bytes(engines, self.problem.extents[adapters], len(self.room)) <= np.array(self.room)).all():
            self.add_all(adapters, engines, 1 / counts[adapters])
            return
        kept = set(adapters.tolist())
        for a in self.by_work:
            if a in kept:
                for e in held[a]:
                    self.add(a, e, 1 / len(held[a]))

    def complete(self, held: CopyMap) -> None:
        """Add copies until each adapter has ``min_copies``, if they fit. A pinned adapter with a copy gets no more.

        Every adapter gets its first copy before any gets a second one. Adapters with the most work come first. Engines
        in ``held``, which hold the adapter now, are preferred.
        """
        queues, pins = _EngineQueues(self), self.problem.pins
        for count in range(1, self.problem.settings.min_copies + 1):
            for a in [a for a in self.by_work if len(self.copies[a]) < count]:
                if a in pins and self.copies[a]:
                    continue
                if not any(self.add(a, e) for e in held[a]):
                    queues.place(a)

    def replicate(self, utilisation: float, held: CopyMap) -> None:
        """Add a second copy of each hot adapter, up to a byte limit.

        If the cost model is ``padded``, no copy may raise the largest rank of its engine.

        An adapter is hot if its work exceeds a fraction of the planned ``utilisation``. Engines in ``held``, which hold
        the adapter now, are preferred. For them, a smaller fraction suffices.
        """
        queues, padded = _EngineQueues(self), self.problem.padded
        one_each = sum(self.extents)
        left = min(one_each * REPLICA_BYTES, one_each * (MAX_HELD_FRACTION * len(self.room) - 1))
        left -= sum(self.extents[a] * (len(on) - 1) for a, on in enumerate(self.copies) if len(on) > 1)
        for a in self.by_work:
            if self.work[a] < self._least_replicated(utilisation):
                break
            if len(self.copies[a]) != 1 or a in self.problem.pins or self.extents[a] > left:
                continue
            suitable = [e for e in held[a] if not padded or self.max_rank[e] >= self.ranks[a]]
            is_hot = self.work[a] >= max(REPLICATE_FROM * utilisation, MIN_REPLICATED_UTILISATION)
            if any(self.add(a, e, 0.0) for e in suitable) or (is_hot and queues.place(a, keep_ranks=True)):
                left -= self.extents[a]

    def drop_surplus(self, utilisation: float) -> None:
        """Drop the copies that the work of an unpinned adapter does not justify, most loaded engines first."""
        dropped = False
        for a in [a for a, held in enumerate(self.copies) if len(held) > 1]:
            if a in self.problem.pins:
                continue
            is_cold = self.work[a] < self._least_replicated(utilisation)
            wanted = max(self.problem.settings.min_copies, 1 if is_cold else 2 + int(self.work[a] / utilisation))
            while len(self.copies[a]) > wanted:
                self._drop(a, max(self.copies[a], key=lambda e: (self.load[e], e)))
                dropped = True
        if dropped:
            adapters, engines, _ = flatten(self.copies)
            used = (self.problem.own_utilisation() > 0)[adapters]
            max_rank = np.zeros(len(self.max_rank), np.int64)
            np.maximum.at(max_rank, engines[used], self.problem.ranks[adapters[used]])
            self.max_rank = max_rank.tolist()

    def _drop(self, a: int, e: int) -> None:
        """Drop one of an adapter's copies. The other copies take over its share in proportion to their own shares."""
        left = tuple(other for other in self.copies[a] if other != e)
        self.copies[a] = left if len(left) > 1 else self.problem.single[left[0]]
        self.room[e] += self.extents[a]
        share = self._partial_shares.pop((a, e), 1.0)
        self.load[e] -= self.work[a] * share
        shares = [self._partial_shares.get((a, other), 1.0) for other in left]
        total = sum(shares)
        for other, own in zip(left, shares, strict=True):
            gained = share * (own / total if total > 0 else 1 / len(left))
            self.load[other] += self.work[a] * gained
            self._partial_shares[a, other] = own + gained

    @staticmethod
    def _least_replicated(utilisation: float) -> float:
        return max(KEEP_REPLICA_FROM * utilisation, MIN_REPLICATED_UTILISATION / 2)


class _EngineQueues:
    """Adds missing copies and second copies, each on the first suitable engine.

    If the cost model is ``padded``, engines whose largest rank would not rise are tried first. For an adapter with
    traffic, the least loaded engines are tried, at most ``TRIES``, and then those with most free bytes. For an adapter
    without traffic, the order is by most free bytes.
    """

    def __init__(self, allocation: Allocation) -> None:
        self._allocation = allocation
        self._heaps: dict[tuple[int, bool], list[EngineKey]] = {}

    def place(self, a: int, keep_ranks: bool = False) -> bool:
        """Add a copy, or return False if no engine is found. ``keep_ranks``: do not raise an engine's largest rank."""
        work, rank = self._allocation.work[a], self._allocation.ranks[a]
        padded = self._allocation.problem.padded
        ranks = ([rank] if keep_ranks else [rank, 0]) if padded else [0]
        return any((work > 0 and self._place(a, level, True)) or self._place(a, level, False) for level in ranks)

    def _place(self, a: int, rank: int, by_load: bool) -> bool:
        heap = self._heap(rank, by_load)
        return first_suitable(heap, lambda e: self._key(e, by_load), lambda e: self._allocation.add(a, e)) is not None

    def _heap(self, rank: int, by_load: bool) -> list[EngineKey]:
        if (rank, by_load) not in self._heaps:
            suitable = [e for e, largest in enumerate(self._allocation.max_rank) if largest >= rank]
            self._heaps[rank, by_load] = [self._key(e, by_load) for e in suitable]
            heapify(self._heaps[rank, by_load])
        return self._heaps[rank, by_load]

    def _key(self, e: int, by_load: bool) -> EngineKey:
        room, load = self._allocation.room[e], self._allocation.load[e]
        return (load, -room, e) if by_load else (-room, load, e)


def first_suitable(
    heap: list[EngineKey], key: Callable[[int], EngineKey], is_suitable: Callable[[int], bool]
) -> int | None:
    """Return the suitable engine with the smallest key, or None if none of the first ``TRIES`` engines is suitable.

    ``heap`` contains one key of each engine. A key may be outdated, but must not exceed the current ``key(engine)``.
    """
    skipped: list[EngineKey] = []
    found = None
    while heap and found is None and len(skipped) < TRIES:
        e = int(heap[0][-1])
        if heap[0] != key(e):
            heapreplace(heap, key(e))
        elif is_suitable(e):
            found = e
        else:
            skipped.append(heappop(heap))
    for entry in skipped:
        heappush(heap, entry)
    return found


def _sum_bytes(engines: Ints, values: Ints, count: int) -> Ints:
    """Return the sum of ``values`` (bytes) by engine. bincount adds in float64, which is exact up to 2**53."""
    return np.bincount(engines, values, count).astype(np.int64)
