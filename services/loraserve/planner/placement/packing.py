"""What each engine is still to get of each class of adapters, while adapters are packed. Pure."""

from collections.abc import Callable
from heapq import heapify, heappop, heappush, heapreplace

import numpy as np

from loraserve.planner.placement.allocation import WORTH_A_COPY, Holdings
from loraserve.planner.placement.bins import Filling
from loraserve.planner.placement.problem import Copies, Floats, Ints, Problem

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


SPLIT = 0.1
"""Of the planned utilisation: an adapter that brings less gets no further copy only to make engines level."""
HUGE = 0.5
"""Of the planned utilisation: an adapter that brings more is placed before lighter ones may stay where they are."""
PIECE = 0.1
"""Of the planned utilisation: an adapter is not split into less."""
SCARCE = 0.9
"""Of all room: where one copy of everything takes more, the hottest choose first, or what stays could keep them out."""


def pack(holdings: Holdings, filling: Filling, engine_of: list[int], held: Copies, short: frozenset[int]) -> None:
    """Copies stay where they are as far as budgets go; the others follow, heaviest first.

    ``short``: engines with less room than others, and too little for what they are to have.
    """
    packing = _Packing(holdings, filling, engine_of, held, short)
    pins = holdings.problem.pins
    asked = [a for a in holdings.by_weight if filling.class_of[a] >= 0 and a not in pins]
    if short:
        asked = packing.fill_short(asked)
    if sum(holdings.extents) > SCARCE * sum(holdings.room):
        for a in asked:
            if not packing.keep(a):
                packing.place(a)
        return
    heavy = [a for a in asked if packing.may_split(a) or len(held[a]) > 1]
    light = asked if not heavy else [a for a in asked if not (packing.may_split(a) or len(held[a]) > 1)]
    bumped = [a for a in heavy if not packing.keep(a)]
    # What fills engines finds them before the light do: what is small fits anywhere, and had better stay.
    filling_engines = [a for a in bumped if holdings.whole[a] >= HUGE * filling.utilisation]
    for a in filling_engines:
        packing.place(a)
    light = packing.keep_all(light)
    for a in bumped[len(filling_engines) :]:
        packing.place(a)
    packing.pour(light)


class _Packing:
    def __init__(
        self, holdings: Holdings, filling: Filling, engine_of: list[int], held: Copies, short: frozenset[int]
    ) -> None:
        self._holdings, self._held, self._short = holdings, held, short
        self._budgets = Budgets(holdings.problem, filling, engine_of, short)
        self._split_from = max(SPLIT * filling.utilisation, WORTH_A_COPY)
        for a in holdings.problem.pins:
            self._budgets.spend(a, holdings.copies[a])

    def may_split(self, a: int) -> bool:
        return self._holdings.whole[a] >= self._split_from

    def fill_short(self, asked: list[int]) -> list[int]:
        """Short engines get what brings most work by the byte, or cold adapters would take their memory and leave them
        idle. The answer is those that they have not got."""
        whole, extents = self._holdings.whole, self._holdings.extents
        given = {a for a in sorted(asked, key=lambda a: -whole[a] / extents[a]) if self._give_short(a)}
        return [a for a in asked if a not in given]

    def _give_short(self, a: int) -> bool:
        """Whole, where it is rather than elsewhere; False where none has the room and the budget."""
        budgets, left = self._budgets, self._budgets.of(a)
        mine = [e for e in self._held[a] if e in self._short and e in left and self._fits(a, e)]
        roomy = budgets.roomiest(a, lambda e: self._fits(a, e), short=True)
        for e in (*mine, roomy):
            if e is not None and budgets.work(a, e) - left[e] <= budgets.slack:
                self._give(a, e, 1.0)
                return True
        return False

    def keep(self, a: int) -> bool:
        """Where it is, on one engine or on all; False where they are to have too little of its class."""
        budgets, left = self._budgets, self._budgets.of(a)
        mine = [e for e in self._held[a] if e in left and self._fits(a, e)]
        if not mine:
            return False
        mine.sort(key=lambda e: (-left[e], e))
        whole, slack = budgets.work(a, mine[0]), budgets.slack
        if left[mine[0]] >= whole - slack:
            self._give(a, mine[0], 1.0)
            return True
        if sum(max(0.0, left[e]) / budgets.work(a, e) for e in mine) < 1 - slack / whole:
            return False
        self._split(a, mine)
        return True

    def place(self, a: int) -> None:
        """On the engine with most left of its class; on several where that is too little for a heavy one."""
        budgets, left = self._budgets, self._budgets.of(a)
        roomy = budgets.roomiest(a, lambda e: self._fits(a, e))
        if roomy is None:
            return
        if budgets.work(a, roomy) - left[roomy] <= budgets.slack or not self.may_split(a):
            self._give(a, roomy, 1.0)
            return
        held = self._held[a]
        self._split(a, sorted((e for e in left if self._fits(a, e)), key=lambda e: (e not in held, -left[e], e)))

    def _split(self, a: int, engines: list[int]) -> None:
        missing, least = 1.0, PIECE * self._budgets.utilisation
        for e in engines:
            work, left = self._budgets.work(a, e), max(0.0, self._budgets.of(a)[e])
            if left < min(least, missing * work) and self._holdings.copies[a]:
                continue
            part = min(missing, left / work)
            self._give(a, e, max(part, 1e-9))
            missing -= part
            if missing * work <= least / 2:
                break

    def _give(self, a: int, e: int, part: float) -> None:
        if self._holdings.put(a, e, part):
            self._budgets.give(a, e, part)

    def _fits(self, a: int, e: int) -> bool:
        return self._holdings.room[e] >= self._holdings.extents[a]

    def keep_all(self, light: list[int]) -> list[int]:
        """Those with one copy or none, at once: on each engine the heaviest stay, as many as its budget has room for.

        The answer is those that do not stay.
        """
        problem, held = self._holdings.problem, self._held
        a = np.array([a for a in light if held[a]], np.int64)
        if not len(a):
            return light
        e = np.array([held[i][0] for i in a.tolist()], np.int64)
        kinds, left = self._budgets.table()
        k = kinds[a]
        fits = np.bincount(e, problem.extents[a], len(problem.engines)) <= np.array(self._holdings.room)
        possible = fits[e] & np.isfinite(left[k, e])
        a, e, k = a[possible], e[possible], k[possible]
        order = np.argsort(k * len(problem.engines) + e, kind="stable")
        a, e, k = a[order], e[order], k[order]
        group = k * len(problem.engines) + e
        work = problem.work.base[a] + self._budgets.ranks()[e] * problem.work.slope[a]
        until = np.cumsum(work)
        starts = np.searchsorted(group, group)
        until = until - until[starts] + work[starts]
        stays = until <= left[k, e] + self._budgets.slack
        a, e = a[stays], e[stays]
        self._holdings.put_all(a, e, np.ones(len(a)))
        self._budgets.give_all(k[stays], e, work[stays])
        kept = set(a.tolist())
        return [i for i in light if i not in kept]

    def pour(self, light: list[int]) -> None:
        """As ``place``, for many that are never split."""
        holdings, budgets = self._holdings, self._budgets
        heaps = {kind: [(-left, e) for e, left in of.items()] for kind, of in budgets.left.items()}
        for heap in heaps.values():
            heapify(heap)
        for a in light:
            heap, extent = heaps[budgets.class_of[a]], holdings.extents[a]
            aside: list[tuple[float, int]] = []
            while heap and holdings.room[heap[0][1]] < extent and len(aside) < TRIES:
                aside.append(heappop(heap))
            if heap and holdings.put(a, heap[0][1]):
                full, e = heap[0]
                heapreplace(heap, (full + budgets.work(a, e), e))
            for entry in aside:
                heappush(heap, entry)
