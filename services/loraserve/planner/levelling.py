"""Whole adapters leave the fullest engine while that helps: what packing them into budgets left uneven. Pure."""

import numpy as np

from loraserve.planner.problem import Copies, Floats, Ints, Pieces, Problem
from loraserve.planner.utilisation import work_of

STEPS_PER_ENGINE = 3
TARGETS = 4
"""Least busy engines that are looked at for each step."""
GAIN = 0.005
"""Of the fullest engine's utilisation: steps that gain less are not worth a move."""


def level(problem: Problem, copies: Copies, pieces: Pieces) -> None:
    """Changes ``copies``: only of adapters that have one copy, are asked for and are not pinned."""
    state = _State(problem, copies, pieces)
    stuck = np.zeros(len(problem.engines), bool)
    for _ in range(STEPS_PER_ENGINE * len(problem.engines)):
        utilisation = state.utilisation()
        if stuck.all() or not state.step(int(np.argmax(np.where(stuck, -1.0, utilisation))), utilisation, stuck):
            break


class _State:
    def __init__(self, problem: Problem, copies: Copies, pieces: Pieces) -> None:
        self._problem, self._copies = problem, copies
        work = work_of(problem, pieces)
        self._base, self._slope, self._rank = work.base, work.slope, work.rank
        held = np.bincount(pieces.engines, problem.extents[pieces.adapters], len(problem.engines))
        self._room = problem.room_bytes - held
        self._asked: list[list[int]] = [[] for _ in problem.engines]
        whole = problem.whole()
        for a, e in zip(pieces.adapters.tolist(), pieces.engines.tolist(), strict=True):
            if whole[a] > 0:
                self._asked[e].append(a)

    def utilisation(self) -> Floats:
        return self._base + self._rank * self._slope

    def step(self, full: int, utilisation: Floats, stuck: "np.ndarray[tuple[int], np.dtype[np.bool_]]") -> bool:
        """One move off that engine, or it is stuck from now on. False where the fullest are stuck for good."""
        found = self._best(full, utilisation)
        if found is None:
            # Engines that are no fuller than the mean have nothing to give.
            stuck[full] = True
            return bool(utilisation[full] > utilisation.mean() * (1 + GAIN))
        adapter, goal = found
        self._move(adapter, full, goal)
        stuck[goal] = False
        return True

    def _best(self, full: int, utilisation: Floats) -> tuple[int, int] | None:
        """The move after which the fuller of both engines is least full."""
        problem, work = self._problem, self._problem.work
        free = [a for a in self._asked[full] if len(self._copies[a]) == 1 and a not in problem.pins]
        if not free:
            return None
        a = np.array(free, np.int64)
        ranks = problem.ranks[a].astype(np.float64)
        left_rank = self._rank_without(full, a)
        after_here = self._base[full] - work.base[a] + left_rank * (self._slope[full] - work.slope[a])
        best, least = None, utilisation[full] * (1 - GAIN)
        for goal in self._goals(full, utilisation):
            rank = np.maximum(self._rank[goal], ranks)
            after_there = self._base[goal] + work.base[a] + rank * (self._slope[goal] + work.slope[a])
            after = np.maximum(after_here, after_there)
            after[problem.extents[a] > self._room[goal]] = np.inf
            i = int(np.argmin(after))
            if after[i] < least:
                best, least = (int(a[i]), goal), after[i]
        return best

    def _goals(self, full: int, utilisation: Floats) -> list[int]:
        """The least busy of all, and of those at a rank that is not lower."""
        count = min(TARGETS, len(utilisation))
        goals = np.argsort(utilisation, kind="stable")[:count].tolist()
        high = np.where(self._rank >= self._rank[full], utilisation, np.inf)
        goals += np.argsort(high, kind="stable")[:count].tolist()
        return [g for g in dict.fromkeys(goals) if g != full]

    def _rank_without(self, engine: int, adapters: Ints) -> Floats:
        """The largest rank left on it without each of these."""
        ranks = np.sort(self._problem.ranks[np.array(self._asked[engine])])
        second = float(ranks[-2]) if len(ranks) > 1 else 0.0
        own = self._problem.ranks[adapters].astype(np.float64)
        return np.where(own >= self._rank[engine], second, self._rank[engine])

    def _move(self, adapter: int, here: int, there: int) -> None:
        work, problem = self._problem.work, self._problem
        self._rank[here] = self._rank_without(here, np.array([adapter]))[0]
        self._rank[there] = max(self._rank[there], problem.ranks[adapter])
        for engine, sign in ((here, -1), (there, 1)):
            self._base[engine] += sign * work.base[adapter]
            self._slope[engine] += sign * work.slope[adapter]
            self._room[engine] -= sign * problem.extents[adapter]
        self._asked[here].remove(adapter)
        self._asked[there].append(adapter)
        self._copies[adapter] = [there]
