"""Packs adapters into bins, and splits only heavy ones. The budgets of bins and the pools' memory limit each engine.

A short engine holds less of its bin's work than the engine with the largest pool would (``EngineChoice.short``).
"""

from heapq import heapify, heappop, heappush, heapreplace

import numpy as np

from loraserve.planner.placement.allocation import (
    MIN_REPLICATED_UTILISATION,
    TRIES,
    Allocation,
    EngineKey,
    first_suitable,
)
from loraserve.planner.placement.bins import NO_CLASS, BinFilling, EngineChoice
from loraserve.planner.placement.problem import CopyMap, Floats, Ints

SLACK = 0.02
"""Fraction of the planned utilisation by which an adapter may overfill a budget."""
SPLIT_FROM = 0.1
"""Fraction of the planned utilisation from which an adapter may be split to balance engines."""
LARGE_FROM = 0.5
"""Fraction of the planned utilisation from which an adapter is placed before held copies of lighter ones are kept."""
LEAST_PART = 0.1
"""Least work of one copy of a split adapter, as a fraction of the planned utilisation."""
SCARCE = 0.9
"""Memory is scarce if one copy of every adapter takes more than this fraction of all free pool bytes. Adapters are then
packed by work, so that held copies of cold adapters do not displace hot ones."""


def pack_bins(allocation: Allocation, filling: BinFilling, choice: EngineChoice, held: CopyMap) -> None:
    """Add copies of unpinned adapters with traffic. Held copies stay if budgets permit."""
    packer = _Packer(allocation, filling, choice, held)
    pins = allocation.problem.pins
    adapters = [a for a in allocation.by_work if filling.class_of[a] != NO_CLASS and a not in pins]
    if choice.short:
        adapters = packer.fill_short_engines(adapters)
    if sum(allocation.extents) > SCARCE * sum(allocation.room):
        for a in adapters:
            if not packer.keep(a):
                packer.place(a)
        return
    # ``keep_light`` handles only adapters with at most one held copy.
    heavy = [a for a in adapters if packer.may_split(a) or len(held[a]) > 1]
    light = [a for a in adapters if not (packer.may_split(a) or len(held[a]) > 1)]
    moved = [a for a in heavy if not packer.keep(a)]
    # Large adapters are placed before light adapters use up budgets. Light adapters fit anywhere.
    large = [a for a in moved if allocation.work[a] >= LARGE_FROM * filling.utilisation]
    for a in large:
        packer.place(a)
    light = packer.keep_light(light)
    for a in moved[len(large) :]:
        packer.place(a)
    packer.place_light(light)


class _Budgets:
    """The utilisation that each engine may still receive from each class of adapters."""

    def __init__(self, allocation: Allocation, filling: BinFilling, choice: EngineChoice) -> None:
        problem = allocation.problem
        self._has_room = allocation.has_room
        self.utilisation = filling.utilisation
        self.slack = SLACK * filling.utilisation
        self.class_of = filling.class_of
        self._base: list[float] = problem.work.base.tolist()
        self._slope: list[float] = problem.work.slope.tolist()
        self.rank = [0.0] * len(choice.engine_of)
        self.left: dict[int, dict[int, float]] = {}
        """Remaining budget, by class and engine."""
        for part, e in zip(filling.bins, choice.engine_of, strict=True):
            self.rank[e] = part.rank
            for adapter_class, budget in part.budgets.items():
                self.left.setdefault(adapter_class, {})[e] = budget
        self._heaps: dict[int, list[EngineKey]] = {
            c: [(-left, e) for e, left in of.items()] for c, of in self.left.items()
        }
        self._short = {c: [entry for entry in heap if entry[1] in choice.short] for c, heap in self._heaps.items()}
        for heap in (*self._heaps.values(), *self._short.values()):
            heapify(heap)

    def left_for(self, a: int) -> dict[int, float]:
        """Return the remaining budget for the adapter's class, by engine."""
        return self.left[self.class_of[a]]

    def work(self, a: int, e: int) -> float:
        """Return the utilisation that the adapter causes on the engine at the largest rank of the engine's bin."""
        return self._base[a] + self.rank[e] * self._slope[a]

    def spend(self, a: int, e: int, part: float) -> None:
        self.left_for(a)[e] -= part * self.work(a, e)

    def spend_pinned(self, a: int, engines: tuple[int, ...]) -> None:
        """Charge each engine with an equal part of a pinned adapter: its class's budget there, or else the largest."""
        if self.class_of[a] == NO_CLASS:
            return
        for e in engines:
            own = self.left_for(a)
            here = [of for of in self.left.values() if e in of]
            left = own if e in own else max(here, key=lambda of: of[e], default={})
            if e in left:
                left[e] -= self.work(a, e) / len(engines)

    def as_table(self) -> tuple[Ints, Floats]:
        """Return the row of each adapter's class, and the remaining budgets ``[row, engine]`` (-inf: no budget)."""
        rows = {adapter_class: i for i, adapter_class in enumerate(self.left)}
        left = np.full((len(rows), len(self.rank)), -np.inf)
        for adapter_class, of in self.left.items():
            left[rows[adapter_class], list(of)] = list(of.values())
        return np.array([rows.get(adapter_class, 0) for adapter_class in self.class_of], np.int64), left

    def spend_rows(self, rows: Ints, engines: Ints, work: Floats) -> None:
        spent = np.zeros((len(self.left), len(self.rank)))
        np.add.at(spent, (rows, engines), work)
        for row, of in zip(spent.tolist(), self.left.values(), strict=True):
            for e in of:
                of[e] -= row[e]

    def largest(self, a: int, short: bool = False) -> int | None:
        """Return the engine with the largest remaining budget for the adapter's class among engines with enough memory.

        ``short``: search only ``EngineChoice.short``. Return None if the first ``TRIES`` engines lack memory.
        """
        heap, left = (self._short if short else self._heaps)[self.class_of[a]], self.left_for(a)
        return first_suitable(heap, lambda e: (-left[e], e), lambda e: self._has_room(a, e))


class _Packer:
    """The steps of ``pack_bins``, which share an allocation and budgets."""

    def __init__(self, allocation: Allocation, filling: BinFilling, choice: EngineChoice, held: CopyMap) -> None:
        self._allocation, self._held, self._short = allocation, held, choice.short
        self._budgets = _Budgets(allocation, filling, choice)
        self._split_from = max(SPLIT_FROM * filling.utilisation, MIN_REPLICATED_UTILISATION)
        for a in allocation.problem.pins:
            self._budgets.spend_pinned(a, allocation.copies[a])

    def may_split(self, a: int) -> bool:
        return self._allocation.work[a] >= self._split_from

    def fill_short_engines(self, adapters: list[int]) -> list[int]:
        """Place adapters on short engines (``EngineChoice.short``), most work per byte first. Return the others.

        Without this step, cold adapters could fill the memory of short engines and leave the engines idle.
        """
        work, extents = self._allocation.work, self._allocation.extents
        given = {a for a in sorted(adapters, key=lambda a: -work[a] / extents[a]) if self._place_on_short(a)}
        return [a for a in adapters if a not in given]

    def _place_on_short(self, a: int) -> bool:
        """Put the adapter on a short engine (``EngineChoice.short``), preferably a holder; False if none suits."""
        budgets, left = self._budgets, self._budgets.left_for(a)
        holders = [e for e in self._held[a] if e in self._short and e in left and self._allocation.has_room(a, e)]
        largest = budgets.largest(a, short=True)
        for e in (*holders, largest):
            if e is not None and budgets.work(a, e) - left[e] <= budgets.slack:
                self._add(a, e, 1.0)
                return True
        return False

    def keep(self, a: int) -> bool:
        """Keep one held copy, or split traffic among held copies. Return False if memory or budgets do not suffice."""
        budgets, left = self._budgets, self._budgets.left_for(a)
        holders = [e for e in self._held[a] if e in left and self._allocation.has_room(a, e)]
        if not holders:
            return False
        holders.sort(key=lambda e: (-left[e], e))
        work, slack = budgets.work(a, holders[0]), budgets.slack
        if left[holders[0]] >= work - slack:
            self._add(a, holders[0], 1.0)
            return True
        if sum(max(0.0, left[e]) / budgets.work(a, e) for e in holders) < 1 - slack / work:
            return False
        self._split(a, holders)
        return True

    def place(self, a: int) -> None:
        """Place the adapter on the engine with the largest budget. If the budget is too small, split heavy adapters."""
        budgets, left = self._budgets, self._budgets.left_for(a)
        largest = budgets.largest(a)
        if largest is None:
            return
        if budgets.work(a, largest) - left[largest] <= budgets.slack or not self.may_split(a):
            self._add(a, largest, 1.0)
            return
        held = self._held[a]
        suitable = [e for e in left if self._allocation.has_room(a, e)]
        self._split(a, sorted(suitable, key=lambda e: (e not in held, -left[e], e)))

    def _split(self, a: int, engines: list[int]) -> None:
        missing, least = 1.0, LEAST_PART * self._budgets.utilisation
        for e in engines:
            work, left = self._budgets.work(a, e), max(0.0, self._budgets.left_for(a)[e])
            if left < min(least, missing * work) and self._allocation.copies[a]:
                continue
            part = min(missing, left / work)
            self._add(a, e, max(part, 1e-9))
            missing -= part
            if missing * work <= least / 2:
                break

    def _add(self, a: int, e: int, part: float) -> None:
        if self._allocation.add(a, e, part):
            self._budgets.spend(a, e, part)

    def keep_light(self, light: list[int]) -> list[int]:
        """Keep held copies of adapters with at most one held copy. Return the adapters without a kept copy.

        On each engine and for each class, the adapters with the most work stay until the budget is used up. An engine
        without memory for all these held copies keeps none.
        """
        problem, held = self._allocation.problem, self._held
        a = np.array([a for a in light if held[a]], np.int64)
        if not len(a):
            return light
        e = np.array([held[i][0] for i in a.tolist()], np.int64)
        rows, left = self._budgets.as_table()
        row = rows[a]
        fits = np.bincount(e, problem.extents[a], len(problem.engines)) <= np.array(self._allocation.room)
        possible = fits[e] & np.isfinite(left[row, e])
        a, e, row = a[possible], e[possible], row[possible]
        order = np.argsort(row * len(problem.engines) + e, kind="stable")
        a, e, row = a[order], e[order], row[order]
        group = row * len(problem.engines) + e
        work = problem.work.base[a] + np.array(self._budgets.rank)[e] * problem.work.slope[a]
        until = np.cumsum(work)
        starts = np.searchsorted(group, group)
        until = until - until[starts] + work[starts]
        stays = until <= left[row, e] + self._budgets.slack
        a, e = a[stays], e[stays]
        self._allocation.add_all(a, e, np.ones(len(a)))
        self._budgets.spend_rows(row[stays], e, work[stays])
        kept = set(a.tolist())
        return [i for i in light if i not in kept]

    def place_light(self, light: list[int]) -> None:
        """Place adapters that are never split. This is a faster version of ``place``."""
        allocation, budgets = self._allocation, self._budgets
        heaps = {c: [(-left, e) for e, left in of.items()] for c, of in budgets.left.items()}
        for heap in heaps.values():
            heapify(heap)
        for a in light:
            heap, extent = heaps[budgets.class_of[a]], allocation.extents[a]
            skipped: list[tuple[float, int]] = []
            while heap and allocation.room[heap[0][1]] < extent and len(skipped) < TRIES:
                skipped.append(heappop(heap))
            if heap and allocation.add(a, heap[0][1]):
                full, e = heap[0]
                heapreplace(heap, (full + budgets.work(a, e), e))
            for entry in skipped:
                heappush(heap, entry)
