"""Balances utilisation: moves adapters off the most utilised engine, and splits traffic among an adapter's copies."""

from bisect import insort

import numpy as np

from loraserve.planner.placement.problem import CopyMap, CopyShares, Floats, Problem, flatten
from loraserve.planner.placement.utilisation import engine_work

STEPS_PER_ENGINE = 3
MAX_STEPS = 400
"""Limit for large clusters. Adapters are small relative to engines there, so packing leaves little to balance."""
TARGETS = 4
"""Number of least utilised engines to consider as targets in each step."""
MIN_GAIN = 0.005
"""Least relative decrease of the fullest engine's utilisation by a move."""
MIN_SHARE = 0.02
"""Least share of a copy, as a fraction of an even share. A share of 0 would mean that the copy does not exist."""
SWEEPS = 2


def balance_engines(problem: Problem, copies: CopyMap, shares: CopyShares) -> None:
    """Move adapters off the most utilised engines while this lowers the higher utilisation of source and target.

    Changes ``copies`` in place. Moves only adapters with traffic, exactly one copy and no pin.
    """
    search = _LocalSearch(problem, copies, shares)
    for _ in range(min(MAX_STEPS, STEPS_PER_ENGINE * len(problem.engines))):
        if not search.step():
            break


class _LocalSearch:
    """Local search that lowers the highest utilisation of all engines. Each step moves at most one adapter."""

    def __init__(self, problem: Problem, copies: CopyMap, shares: CopyShares) -> None:
        self._problem, self._copies = problem, copies
        work, count = engine_work(problem, shares), len(problem.engines)
        self._base, self._slope, self._rank = work.base, work.slope, work.rank
        held_bytes = np.bincount(shares.engines, problem.extents[shares.adapters], count)
        self._room = problem.room_bytes - held_bytes
        self._stuck = np.zeros(count, bool)
        self._adapters_on: list[list[int]] = [[] for _ in range(count)]
        used = problem.own_utilisation()[shares.adapters] > 0
        for a, e in zip(shares.adapters[used].tolist(), shares.engines[used].tolist(), strict=True):
            self._adapters_on[e].append(a)
        self._ranks_on: dict[int, list[int]] = {}

    def step(self) -> bool:
        """Move an adapter off the most utilised engine, or mark this engine as stuck. Return False when done."""
        utilisation = self._base + self._rank * self._slope
        full = int(np.argmax(np.where(self._stuck, -1.0, utilisation)))
        if self._stuck[full] or utilisation[full] <= utilisation.mean() * (1 + MIN_GAIN):
            return False
        found = self._best_move(full, utilisation)
        if found is None:
            self._stuck[full] = True
        else:
            adapter, target = found
            self._move(adapter, full, target)
            self._stuck[target] = False
        return True

    def _best_move(self, full: int, utilisation: Floats) -> tuple[int, int] | None:
        """Return the (adapter, target) that minimises the higher utilisation of ``full`` and target, or None."""
        problem, work, copies = self._problem, self._problem.work, self._copies
        movable = [a for a in self._adapters_on[full] if len(copies[a]) == 1 and a not in problem.pins]
        targets = np.array(self._targets(full, utilisation), np.int64)
        if not movable or not len(targets):
            return None
        a = np.array(movable, np.int64)
        ranks, base, slope = problem.ranks[a].astype(np.float64), work.base[a], work.slope[a]
        rank_left = np.where(ranks >= self._rank[full], self._second_rank(full), self._rank[full])
        here = self._base[full] - base + rank_left * (self._slope[full] - slope)
        # Rows are targets, columns adapters.
        rank = np.maximum(self._rank[targets][:, None], ranks)
        there = self._base[targets][:, None] + base + rank * (self._slope[targets][:, None] + slope)
        after = np.maximum(here, there)
        after[problem.extents[a] > self._room[targets][:, None]] = np.inf
        target, i = divmod(int(np.argmin(after)), len(a))
        if after[target, i] >= utilisation[full] * (1 - MIN_GAIN):
            return None
        return int(a[i]), int(targets[target])

    def _targets(self, full: int, utilisation: Floats) -> list[int]:
        """Return the least utilised engines, preferably also some whose largest rank is at least that of ``full``."""
        targets = _smallest(utilisation, TARGETS)
        targets += _smallest(np.where(self._rank >= self._rank[full], utilisation, np.inf), TARGETS)
        return [e for e in dict.fromkeys(targets) if e != full]

    def _second_rank(self, engine: int) -> float:
        """Return the engine's largest rank after one adapter of the largest rank is removed."""
        ranks = self._sorted_ranks(engine)
        return float(ranks[-2]) if len(ranks) > 1 else 0.0

    def _sorted_ranks(self, engine: int) -> list[int]:
        if engine not in self._ranks_on:
            self._ranks_on[engine] = sorted(self._problem.ranks[self._adapters_on[engine]].tolist())
        return self._ranks_on[engine]

    def _move(self, adapter: int, here: int, there: int) -> None:
        work, problem = self._problem.work, self._problem
        rank = int(problem.ranks[adapter])
        # Both lists must be built before ``_adapters_on`` changes.
        ranks_here, ranks_there = self._sorted_ranks(here), self._sorted_ranks(there)
        ranks_here.remove(rank)
        insort(ranks_there, rank)
        self._rank[here] = ranks_here[-1] if ranks_here else 0.0
        self._rank[there] = ranks_there[-1]
        for engine, sign in ((here, -1), (there, 1)):
            self._base[engine] += sign * work.base[adapter]
            self._slope[engine] += sign * work.slope[adapter]
            self._room[engine] -= sign * problem.extents[adapter]
        self._adapters_on[here].remove(adapter)
        self._adapters_on[there].append(adapter)
        self._copies[adapter] = problem.single[there]


def _smallest(values: Floats, count: int) -> list[int]:
    """Return the indices of the ``count`` smallest values, in ascending order of values and then of indices."""
    if len(values) > 8 * count:
        bound = np.partition(values, count)[count]
        candidates = np.flatnonzero(values <= bound)
        return candidates[np.argsort(values[candidates], kind="stable")][:count].tolist()  # type: ignore[no-any-return]
    return np.argsort(values, kind="stable")[:count].tolist()  # type: ignore[no-any-return]


def split_traffic(problem: Problem, copies: CopyMap) -> CopyShares:
    """Return the copies with shares of traffic that make the utilisation of their engines about even.

    The shares depend only on copies and demand, not on earlier shares, so that equal inputs give equal shares.
    """
    adapters, engines, counts = flatten(copies)
    shares = np.ones(len(adapters))
    starts = np.cumsum(counts) - counts
    work = problem.own_utilisation()
    split = np.flatnonzero(counts > 1)
    # The adapters with the most work come first, because they determine which engines run at a high rank.
    split = split[np.argsort(-work[split], kind="stable")]
    single = counts[adapters] == 1
    levels = _EngineLevels(problem, CopyShares(adapters[single], engines[single], shares[single]))
    mean = float(work.sum()) / max(1, len(problem.engines))
    for sweep in range(SWEEPS):
        for a in split.tolist():
            at = slice(starts[a], starts[a] + counts[a])
            if work[a] <= 0:
                shares[at] = 1 / counts[a]
                continue
            held = engines[at]
            if sweep:
                levels.add(a, held, -shares[at])
            shares[at] = levels.best_shares(a, held, mean)
            levels.add(a, held, shares[at])
    return CopyShares(adapters, engines, shares)


class _EngineLevels:
    """The utilisation of engines while shares are computed. Initially it includes only adapters with one copy."""

    def __init__(self, problem: Problem, single: CopyShares) -> None:
        self._work, self._ranks = problem.work, problem.ranks
        engines = engine_work(problem, single)
        self._base, self._slope, self._rank = engines.base, engines.slope, engines.rank

    def add(self, adapter: int, held: np.ndarray, shares: Floats) -> None:
        """Add the adapter's work to the engines ``held`` in proportion to ``shares``. Negative shares remove work."""
        self._base[held] += self._work.base[adapter] * shares
        self._slope[held] += self._work.slope[adapter] * shares
        used = held[shares > MIN_SHARE / len(held)]
        self._rank[used] = np.maximum(self._rank[used], self._ranks[adapter])

    def best_shares(self, adapter: int, held: np.ndarray, mean: float) -> Floats:
        """Return the adapter's share on each engine in ``held``. ``mean`` is the mean utilisation of all engines.

        Engines whose largest rank would rise get the minimum share, unless the other engines would become too full.
        """
        rank = np.maximum(self._rank[held], self._ranks[adapter])
        before = self._base[held] + rank * self._slope[held]
        needed = self._work.base[adapter] + rank * self._work.slope[adapter]
        free = (self._rank[held] >= self._ranks[adapter]) | (before <= 0)
        if free.any() and not free.all():
            parts, level = _fill_to_level(before[free], needed[free])
            if level <= max(mean, float(before[~free].min())):
                shares = np.zeros(len(held))
                shares[free] = parts
                return _raise_to_minimum(shares)
        return _raise_to_minimum(_fill_to_level(before, needed)[0])


def _fill_to_level(before: Floats, needed: Floats) -> tuple[Floats, float]:
    """Return shares that raise the lowest utilisations to one level, and this level (water filling).

    ``before``: utilisation of each engine without the adapter. ``needed``: what all of the adapter's traffic would add.
    """
    order = np.argsort(before, kind="stable")
    heights, widths = before[order], 1 / needed[order]
    # If the k lowest are filled: sum((level - height) * width) = 1.
    levels = (1 + np.cumsum(heights * widths)) / np.cumsum(widths)
    filled = np.flatnonzero(levels > heights)
    level = float(levels[filled[-1]])
    parts = np.maximum(level - before, 0) / needed
    return parts / parts.sum(), level


def _raise_to_minimum(parts: Floats) -> Floats:
    parts = np.maximum(parts, MIN_SHARE / len(parts))
    result: Floats = parts / parts.sum()
    return result
