"""What each engine is still to get of each class of adapters, while adapters are packed. Pure."""

from collections.abc import Callable
from heapq import heapify, heappop, heappush, heapreplace

from loraserve.planner.fill import Filling
from loraserve.planner.problem import Problem

SLACK = 0.02
"""Of the planned utilisation: an adapter goes where it overfills by no more than this, and stays where it is."""
TRIES = 8
"""Engines of a class that are asked for room before any other is."""


class Budgets:
    """What each engine has left of each class."""

    def __init__(self, problem: Problem, filling: Filling, engine_of: list[int]) -> None:
        self.utilisation = filling.utilisation
        self.slack = SLACK * filling.utilisation
        self._class_of = filling.class_of
        self._base: list[float] = problem.work.base.tolist()
        self._slope: list[float] = problem.work.slope.tolist()
        self._rank = [0.0] * len(engine_of)
        self._left: dict[int, dict[int, float]] = {}
        for part, e in zip(filling.bins, engine_of, strict=True):
            self._rank[e] = part.rank
            for kind, budget in part.budgets.items():
                self._left.setdefault(kind, {})[e] = budget
        self._heaps = {kind: [(-left, e) for e, left in of.items()] for kind, of in self._left.items()}
        for heap in self._heaps.values():
            heapify(heap)

    def of(self, a: int) -> dict[int, float]:
        return self._left[self._class_of[a]]

    def work(self, a: int, e: int) -> float:
        return self._base[a] + self._rank[e] * self._slope[a]

    def give(self, a: int, e: int, part: float) -> None:
        self.of(a)[e] -= part * self.work(a, e)

    def spend(self, a: int, engines: list[int]) -> None:
        """A pinned adapter takes of its own class where the engine has it, else of whatever it has."""
        if self._class_of[a] < 0:
            return
        for e in engines:
            own = self.of(a)
            here = [of for of in self._left.values() if e in of]
            left = own if e in own else max(here, key=lambda of: of[e], default={})
            if e in left:
                left[e] -= self.work(a, e) / len(engines)

    def roomiest(self, a: int, fits: Callable[[int], bool]) -> int | None:
        """The engine of its class with most left that has the memory; None where the first few have not."""
        heap, left = self._heaps[self._class_of[a]], self.of(a)
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
