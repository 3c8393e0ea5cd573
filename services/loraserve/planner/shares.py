"""What part of an adapter's traffic each of its copies should take: as level as its engines can be made. Pure.

Depends on where copies are and on demand, never on the shares before: the same copies have the same shares.
"""

import numpy as np

from loraserve.planner.problem import Copies, Floats, Pieces, Problem, flat

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
