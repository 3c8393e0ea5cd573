"""Whole adapters leave the fullest engine while that helps: what packing them into budgets left uneven. Pure."""

from bisect import insort

import numpy as np

from loraserve.planner.placement.problem import Copies, Floats, Pieces, Problem, flat
from loraserve.planner.placement.utilisation import work_of

STEPS_PER_ENGINE = 3
MOST_STEPS = 400
"""Where engines are many, adapters are small beside them, and packing leaves little to level."""
TARGETS = 4
"""Least busy engines that are looked at for each step."""
GAIN = 0.005
"""Of the fullest engine's utilisation: steps that gain less are not worth a move."""


def level(problem: Problem, copies: Copies, pieces: Pieces) -> None:
    """Changes ``copies``: only of adapters that have one copy, are asked for and are not pinned."""
    state = _State(problem, copies, pieces)
    for _ in range(min(MOST_STEPS, STEPS_PER_ENGINE * len(problem.engines))):
        if not state.step():
            break


class _State:
    def __init__(self, problem: Problem, copies: Copies, pieces: Pieces) -> None:
        self._problem, self._copies = problem, copies
        work, count = work_of(problem, pieces), len(problem.engines)
        self._base, self._slope, self._rank = work.base, work.slope, work.rank
        held = np.bincount(pieces.engines, problem.extents[pieces.adapters], count)
        self._room = problem.room_bytes - held
        self._stuck = np.zeros(count, bool)
        self._asked: list[list[int]] = [[] for _ in range(count)]
        asked = problem.whole()[pieces.adapters] > 0
        for a, e in zip(pieces.adapters[asked].tolist(), pieces.engines[asked].tolist(), strict=True):
            self._asked[e].append(a)
        self._ranks: dict[int, list[int]] = {}

    def step(self) -> bool:
        """One move off the fullest engine not stuck yet, or it is. False where that is no fuller than the mean."""
        utilisation = self._base + self._rank * self._slope
        full = int(np.argmax(np.where(self._stuck, -1.0, utilisation)))
        if self._stuck[full] or utilisation[full] <= utilisation.mean() * (1 + GAIN):
            return False
        found = self._best(full, utilisation)
        if found is None:
            self._stuck[full] = True
        else:
            self._move(found[0], full, found[1])
            self._stuck[found[1]] = False
        return True

    def _best(self, full: int, utilisation: Floats) -> tuple[int, int] | None:
        """The move after which the fuller of both engines is least full."""
        problem, work, copies = self._problem, self._problem.work, self._copies
        free = [a for a in self._asked[full] if len(copies[a]) == 1 and a not in problem.pins]
        goals = np.array(self._goals(full, utilisation), np.int64)
        if not free or not len(goals):
            return None
        a = np.array(free, np.int64)
        ranks, base, slope = problem.ranks[a].astype(np.float64), work.base[a], work.slope[a]
        left = np.where(ranks >= self._rank[full], self._second_rank(full), self._rank[full])
        here = self._base[full] - base + left * (self._slope[full] - slope)
        # Rows are goals, columns adapters.
        rank = np.maximum(self._rank[goals][:, None], ranks)
        there = self._base[goals][:, None] + base + rank * (self._slope[goals][:, None] + slope)
        after = np.maximum(here, there)
        after[problem.extents[a] > self._room[goals][:, None]] = np.inf
        goal, i = divmod(int(np.argmin(after)), len(a))
        if after[goal, i] >= utilisation[full] * (1 - GAIN):
            return None
        return int(a[i]), int(goals[goal])

    def _goals(self, full: int, utilisation: Floats) -> list[int]:
        """The least busy of all, and of those at a rank that is not lower."""
        goals = _least(utilisation, TARGETS)
        goals += _least(np.where(self._rank >= self._rank[full], utilisation, np.inf), TARGETS)
        return [g for g in dict.fromkeys(goals) if g != full]

    def _second_rank(self, engine: int) -> float:
        """The largest rank left without one adapter of the largest."""
        ranks = self._ranks_on(engine)
        return float(ranks[-2]) if len(ranks) > 1 else 0.0

    def _ranks_on(self, engine: int) -> list[int]:
        if engine not in self._ranks:
            self._ranks[engine] = sorted(self._problem.ranks[self._asked[engine]].tolist())
        return self._ranks[engine]

    def _move(self, adapter: int, here: int, there: int) -> None:
        work, problem = self._problem.work, self._problem
        rank = int(problem.ranks[adapter])
        # What an engine holds is known before the move changes it.
        ranks_here, ranks_there = self._ranks_on(here), self._ranks_on(there)
        ranks_here.remove(rank)
        insort(ranks_there, rank)
        self._rank[here] = ranks_here[-1] if ranks_here else 0.0
        self._rank[there] = ranks_there[-1]
        for engine, sign in ((here, -1), (there, 1)):
            self._base[engine] += sign * work.base[adapter]
            self._slope[engine] += sign * work.slope[adapter]
            self._room[engine] -= sign * problem.extents[adapter]
        self._asked[here].remove(adapter)
        self._asked[there].append(adapter)
        self._copies[adapter] = problem.alone[there]


def _least(values: Floats, count: int) -> list[int]:
    """Indices of the smallest, in order; of equal ones the first."""
    if len(values) > 8 * count:
        bound = np.partition(values, count)[count]
        near = np.flatnonzero(values <= bound)
        return near[np.argsort(values[near], kind="stable")][:count].tolist()  # type: ignore[no-any-return]
    return np.argsort(values, kind="stable")[:count].tolist()  # type: ignore[no-any-return]


LEAST_SHARE = 0.02
"""Of an even share, for a copy that had better get nothing: a share of 0 would be no copy."""
SWEEPS = 2


def pieces_of(problem: Problem, copies: Copies) -> Pieces:
    """All copies with their shares, in order of adapters."""
    adapters, engines, counts = flat(copies)
    shares = np.ones(len(adapters))
    starts = np.cumsum(counts) - counts
    whole = problem.whole()
    split = np.flatnonzero(counts > 1)
    # Heaviest first: they decide which engines are at a high rank anyway.
    split = split[np.argsort(-whole[split], kind="stable")]
    levels = _Levels(problem, adapters, engines, counts[adapters] == 1)
    level = float(whole.sum()) / max(1, len(problem.engines))
    for sweep in range(SWEEPS):
        for a in split.tolist():
            at = slice(starts[a], starts[a] + counts[a])
            if whole[a] <= 0:
                shares[at] = 1 / counts[a]
                continue
            held = engines[at]
            if sweep:
                levels.add(a, held, -shares[at])
            shares[at] = levels.shares(a, held, level)
            levels.add(a, held, shares[at])
    return Pieces(adapters, engines, shares)


class _Levels:
    """Utilisation of engines while shares are found."""

    def __init__(self, problem: Problem, adapters: np.ndarray, engines: np.ndarray, single: np.ndarray) -> None:
        count = len(problem.engines)
        self._work, self._ranks = problem.work, problem.ranks
        at, on = adapters[single], engines[single]
        self._base = np.bincount(on, self._work.base[at], count).astype(np.float64)
        self._slope = np.bincount(on, self._work.slope[at], count).astype(np.float64)
        self._rank = np.zeros(count)
        asked = problem.whole()[at] > 0
        np.maximum.at(self._rank, on[asked], self._ranks[at][asked].astype(np.float64))

    def add(self, adapter: int, held: np.ndarray, shares: Floats) -> None:
        self._base[held] += self._work.base[adapter] * shares
        self._slope[held] += self._work.slope[adapter] * shares
        used = held[shares > LEAST_SHARE / len(held)]
        self._rank[used] = np.maximum(self._rank[used], self._ranks[adapter])

    def shares(self, adapter: int, held: np.ndarray, mean: float) -> Floats:
        """Only among engines whose rank it does not raise, unless those would be fuller than the others then."""
        rank = np.maximum(self._rank[held], self._ranks[adapter])
        before = self._base[held] + rank * self._slope[held]
        needs = self._work.base[adapter] + rank * self._work.slope[adapter]
        free = (self._rank[held] >= self._ranks[adapter]) | (before <= 0)
        if free.any() and not free.all():
            parts, level = _levelled(before[free], needs[free])
            if level <= max(mean, float(before[~free].min())):
                shares = np.zeros(len(held))
                shares[free] = parts
                return _at_least(shares)
        return _at_least(_levelled(before, needs)[0])


def _levelled(before: Floats, needs: Floats) -> tuple[Floats, float]:
    """Parts that sum to 1, poured where the level is lowest; and the level that is reached."""
    order = np.argsort(before, kind="stable")
    heights, widths = before[order], 1 / needs[order]
    # With the k lowest under water: sum((level - height) * width) = 1.
    levels = (1 + np.cumsum(heights * widths)) / np.cumsum(widths)
    wet = np.flatnonzero(levels > heights)
    level = float(levels[wet[-1]])
    parts = np.maximum(level - before, 0) / needs
    return parts / parts.sum(), level


def _at_least(parts: Floats) -> Floats:
    parts = np.maximum(parts, LEAST_SHARE / len(parts))
    result: Floats = parts / parts.sum()
    return result
