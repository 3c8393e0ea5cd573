"""Whole adapters into engines: first into what each engine should serve of their class, as far as memory goes. Pure."""

import numpy as np

from loraserve.planner.budgets import Budgets
from loraserve.planner.fill import Filling
from loraserve.planner.problem import Copies, Problem
from loraserve.planner.spots import Spots

SPLIT = 0.1
"""Of the planned utilisation: an adapter that brings less gets no further copy only to make engines level."""
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
PIECE = 0.1
"""Of an adapter: it is not split into less."""


class Packer:
    """Fills ``copies`` under the room of each engine."""

    def __init__(self, problem: Problem, copies: Copies) -> None:
        self._problem = problem
        self.copies = copies
        self._room: list[int] = problem.room_bytes.tolist()
        self._extents: list[int] = problem.extents.tolist()
        self._ranks: list[int] = problem.ranks.tolist()
        self._whole: list[float] = problem.whole().tolist()
        self._load = [0.0] * len(problem.engines)
        self._rank = [0] * len(problem.engines)
        for a, held in enumerate(copies):
            for e in held:
                self._take(a, e, 1 / len(held))
        self.by_weight: list[int] = np.argsort(-problem.whole(), kind="stable").tolist()

    def _take(self, a: int, e: int, share: float) -> None:
        self._room[e] -= self._extents[a]
        self._load[e] += self._whole[a] * share
        if self._whole[a] > 0 and self._ranks[a] > self._rank[e]:
            self._rank[e] = self._ranks[a]

    def put(self, a: int, e: int, share: float = 1.0) -> bool:
        """False where it is already or does not fit."""
        if self._room[e] < self._extents[a] or e in self.copies[a]:
            return False
        self.copies[a].append(e)
        self._take(a, e, share)
        return True

    def pin(self) -> None:
        """Pinned adapters, hot first, on their engines that have the memory."""
        for a in sorted(self._problem.pins, key=lambda a: (-self._whole[a], a)):
            for e in self._problem.pins[a]:
                self.put(a, e, 1 / len(self._problem.pins[a]))

    def stay(self, held: Copies, asked: bool) -> None:
        """What is held, hot first, as far as there is memory; ``asked`` False: only of what nobody asks for."""
        for a in self.by_weight:
            if held[a] and a not in self._problem.pins and (asked or self._whole[a] <= 0):
                for e in held[a]:
                    self.put(a, e, 1 / len(held[a]))

    # What is asked for, into the budgets of its class.

    def pack(self, filling: Filling, engine_of: list[int], held: Copies) -> None:
        """Copies stay where they are as far as budgets go; the others follow, heaviest first."""
        budgets = Budgets(self._problem, filling, engine_of)
        for a in self._problem.pins:
            budgets.spend(a, self.copies[a])
        asked = [a for a in self.by_weight if filling.class_of[a] >= 0 and a not in self._problem.pins]
        # Where memory is short the hottest choose first, or what stays could keep them out.
        scarce = sum(self._extents) > 0.9 * sum(self._room)
        bumped = []
        for a in asked:
            if self._keep(a, budgets, held[a]):
                continue
            if scarce:
                self._place(a, budgets)
            else:
                bumped.append(a)
        for a in bumped:
            self._place(a, budgets)

    def _keep(self, a: int, budgets: Budgets, held: list[int]) -> bool:
        left = budgets.of(a)
        mine = [e for e in held if e in left and self._room[e] >= self._extents[a]]
        if not mine:
            return False
        if len(mine) > 1:
            mine.sort(key=lambda e: (-left[e], e))
        whole, slack = budgets.work(a, mine[0]), budgets.slack
        if left[mine[0]] >= whole - slack:
            self._give(a, mine[0], 1.0, budgets)
            return True
        if sum(max(0.0, left[e]) / budgets.work(a, e) for e in mine) < 1 - slack / whole:
            return False
        self._split(a, mine, budgets)
        return True

    def _place(self, a: int, budgets: Budgets) -> None:
        """On the engine with most left of its class; on several where that is too little for a heavy one."""
        roomy = budgets.roomiest(a, lambda e: self._room[e] >= self._extents[a])
        if roomy is None:
            return
        overfull = budgets.work(a, roomy) - budgets.of(a)[roomy]
        if overfull <= budgets.slack or self._whole[a] < max(SPLIT * budgets.utilisation, WORTH_A_COPY):
            self._give(a, roomy, 1.0, budgets)
            return
        left = budgets.of(a)
        fits = [e for e in left if self._room[e] >= self._extents[a]]
        self._split(a, sorted(fits, key=lambda e: (-left[e], e)), budgets)

    def _split(self, a: int, engines: list[int], budgets: Budgets) -> None:
        missing = 1.0
        for e in engines:
            part = min(missing, max(0.0, budgets.of(a)[e]) / budgets.work(a, e))
            if part < min(PIECE, missing) and self.copies[a]:
                break
            self._give(a, e, max(part, 1e-9), budgets)
            missing -= part
            if missing <= PIECE / 2:
                break

    def _give(self, a: int, e: int, part: float, budgets: Budgets) -> None:
        if self.put(a, e, part):
            budgets.give(a, e, part)

    # What nobody asks for, what found no room, and further copies.

    def complete(self, held: Copies) -> None:
        """A copy of everything that fits, hot first, then the least number of copies.

        Where ``held`` has one already, that one.
        """
        spots = Spots(self)
        for count in range(1, self._problem.settings.min_copies + 1):
            for a in self.by_weight:
                if len(self.copies[a]) >= count or (a in self._problem.pins and self.copies[a]):
                    continue
                if not any(self.put(a, e) for e in held[a]):
                    spots.put(a)
        self._sort()

    def _sort(self) -> None:
        for on in self.copies:
            if len(on) > 1:
                on.sort()

    def replicate(self, utilisation: float, held: Copies) -> None:
        """Second copies of the hot where their rank slows nobody, as far as bytes go; those that are held first."""
        spots = Spots(self)
        one = sum(self._extents)
        left = min(one * REPLICA_BYTES, one * (HELD_BYTES * len(self._problem.engines) - 1))
        left -= sum(self._extents[a] * (len(on) - 1) for a, on in enumerate(self.copies) if len(on) > 1)
        for a in self.by_weight:
            if self._whole[a] < max(REPLICATED * utilisation, WORTH_A_COPY / 2):
                break
            if len(self.copies[a]) != 1 or a in self._problem.pins or self._extents[a] > left:
                continue
            near = [e for e in held[a] if not self.padded or self._rank[e] >= self._ranks[a]]
            new = self._whole[a] >= max(REPLICATE * utilisation, WORTH_A_COPY)
            if any(self.put(a, e, 0.0) for e in near) or (new and spots.put(a, only_ranked=True)):
                left -= self._extents[a]
        self._sort()

    def drop_surplus(self, utilisation: float) -> None:
        """Copies that the adapter brings too little for; those on the fullest engines go first."""
        for a, held in enumerate(self.copies):
            if len(held) <= 1 or a in self._problem.pins:
                continue
            whole = self._whole[a]
            wanted = 1 if whole < max(REPLICATED * utilisation, WORTH_A_COPY / 2) else 2 + int(whole / utilisation)
            wanted = max(self._problem.settings.min_copies, wanted)
            while len(held) > wanted:
                fullest = max(held, key=lambda e: (self._load[e], e))
                held.remove(fullest)
                self._room[fullest] += self._extents[a]

    def state(self, e: int) -> tuple[int, float, int]:
        """Room in bytes, utilisation so far, largest rank."""
        return self._room[e], self._load[e], self._rank[e]

    def needs(self, a: int) -> tuple[int, float, int]:
        """Bytes, work, rank."""
        return self._extents[a], self._whole[a], self._ranks[a]

    @property
    def padded(self) -> bool:
        return self._problem.padded

    @property
    def engines(self) -> int:
        return len(self._room)
