"""What each engine is still to get of each class of adapters, while adapters are packed. Pure."""

from collections.abc import Callable
from heapq import heapify, heappop, heappush, heapreplace

import numpy as np

from loraserve.planner.fill import Filling
from loraserve.planner.problem import Floats, Ints, Problem

SLACK = 0.02
"""Of the planned utilisation: an adapter goes where it overfills by no more than this, and stays where it is."""
TRIES = 8
"""Engines of a class that are asked for room before any other is."""


class Budgets:
    """What each engine has left of each class."""

    def __init__(self, problem: Problem, filling: Filling, engine_of: list[int], short: frozenset[int]) -> None:
        self.utilisation = filling.utilisation
        self.slack = SLACK * filling.utilisation
        self.class_of = filling.class_of
        self._base: list[float] = problem.work.base.tolist()
        self._slope: list[float] = problem.work.slope.tolist()
        self._rank = [0.0] * len(engine_of)
        self.left: dict[int, dict[int, float]] = {}
        for part, e in zip(filling.bins, engine_of, strict=True):
            self._rank[e] = part.rank
            for kind, budget in part.budgets.items():
                self.left.setdefault(kind, {})[e] = budget
        self._heaps = {kind: [(-left, e) for e, left in of.items()] for kind, of in self.left.items()}
        self._short = {kind: [entry for entry in heap if entry[1] in short] for kind, heap in self._heaps.items()}
        for heap in (*self._heaps.values(), *self._short.values()):
            heapify(heap)

    def of(self, a: int) -> dict[int, float]:
        return self.left[self.class_of[a]]

    def work(self, a: int, e: int) -> float:
        return self._base[a] + self._rank[e] * self._slope[a]

    def give(self, a: int, e: int, part: float) -> None:
        self.of(a)[e] -= part * self.work(a, e)

    def table(self) -> tuple[Ints, Floats]:
        """By adapter the row of its class, and by row and engine what is left; -inf where the engine has none of it."""
        rows = {kind: i for i, kind in enumerate(self.left)}
        left = np.full((len(rows), len(self._rank)), -np.inf)
        for kind, of in self.left.items():
            left[rows[kind], list(of)] = list(of.values())
        return np.array([rows.get(kind, 0) for kind in self.class_of], np.int64), left

    def ranks(self) -> Floats:
        return np.array(self._rank)

    def give_all(self, rows: Ints, engines: Ints, work: Floats) -> None:
        """The same as give, of many: by row of the table."""
        given = np.zeros((len(self.left), len(self._rank)))
        np.add.at(given, (rows, engines), work)
        for row, of in zip(given.tolist(), self.left.values(), strict=True):
            for e in of:
                of[e] -= row[e]

    def spend(self, a: int, engines: tuple[int, ...]) -> None:
        """A pinned adapter takes of its own class where the engine has it, else of whatever it has."""
        if self.class_of[a] < 0:
            return
        for e in engines:
            own = self.of(a)
            here = [of for of in self.left.values() if e in of]
            left = own if e in own else max(here, key=lambda of: of[e], default={})
            if e in left:
                left[e] -= self.work(a, e) / len(engines)

    def roomiest(self, a: int, fits: Callable[[int], bool], short: bool = False) -> int | None:
        """The engine of its class with most left that has the memory, of all or of the short ones; None where the first
        few have not."""
        heap, left = (self._short if short else self._heaps)[self.class_of[a]], self.of(a)
        aside: list[tuple[float, int]] = []
        found = None
        while heap and len(aside) < TRIES:
            said, e = heap[0]
            if -said != left[e]:
                heapreplace(heap, (-left[e], e))
            elif fits(e):
                found = e
                break
            else:
                aside.append(heappop(heap))
        for entry in aside:
            heappush(heap, entry)
        return found
