"""Lists the moves between two plans, with the reason and the gain of each move.

Gains and reasons are computed with the cost model that is used to make plans.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest

import msgspec
import numpy as np

from loraserve.messages import Move, Placement
from loraserve.planner.placement.problem import CopyShares, Floats, Ints, PlanInput, Problem, build_problem
from loraserve.planner.placement.utilisation import EngineWork, engine_ttft_s, engine_work

NONE = -1
"""Index of an adapter or engine that is not in the problem."""


def diff(current: Sequence[Placement], target: Sequence[Placement]) -> list[Move]:
    """Return the added, removed and moved copies. Bytes, reasons and gains of the moves are not set.

    An added and a removed copy of the same adapter form one move.
    """
    before, after = _engines_by_version(current), _engines_by_version(target)
    names = {p.version: p.name for p in (*current, *target)}
    moves: list[Move] = []
    for version in sorted(before.keys() | after.keys(), key=lambda v: (names[v], v)):
        removed = sorted(before.get(version, set()) - after.get(version, set()))
        added = sorted(after.get(version, set()) - before.get(version, set()))
        moves.extend(
            Move(version=version, name=names[version], source=source, target=target_engine, slab_bytes=0, reason="")
            for source, target_engine in zip_longest(removed, added, fillvalue="")
        )
    return moves


def explain_moves(inputs: PlanInput, target: Sequence[Placement]) -> tuple[Move, ...]:
    """Return the moves from ``inputs.current`` to ``target`` with the bytes they load, their reasons and gains.

    The gain of a move is the time in seconds by which the mean predicted TTFT would rise if only this move were undone.
    The gain may be slightly negative for a move that only removes a copy, because its purpose is to free memory.
    """
    moves = diff(inputs.current, target)
    if not moves:
        return ()
    problem = build_problem(msgspec.structs.replace(inputs, current=()))
    before, after = _copy_shares(problem, inputs.current), _copy_shares(problem, target)
    gains = _Gains(problem, before, after).compute(moves)
    reasons = _Reasons(problem, before, after)
    loaded = [inputs.adapters.get(move.version) if move.target else None for move in moves]
    return tuple(
        msgspec.structs.replace(
            move, slab_bytes=ref.slab_bytes if ref else 0, gain_s=gain, reason=reasons.explain(move)
        )
        for move, ref, gain in zip(moves, loaded, gains, strict=True)
    )


def _engines_by_version(placements: Iterable[Placement]) -> dict[str, set[str]]:
    engines: dict[str, set[str]] = {}
    for placement in placements:
        engines.setdefault(placement.version, set()).add(placement.engine)
    return engines


def _copy_shares(problem: Problem, placements: Sequence[Placement]) -> CopyShares:
    index, engines = problem.adapter_index(), problem.engine_index()
    known = [p for p in placements if p.version in index and p.engine in engines]
    return CopyShares(
        np.array([index[p.version] for p in known], np.int64),
        np.array([engines[p.engine] for p in known], np.int64),
        np.array([p.share for p in known], np.float64),
    )


class _Gains:
    """Computes the gains of all moves at once. The gain of a move is the TTFT that undoing only this move would add.

    Undoing a move changes the predictions of two engines: the one that gives traffic away, and the one that takes it.
    """

    def __init__(self, problem: Problem, before: CopyShares, after: CopyShares) -> None:
        self._problem = problem
        self._work = engine_work(problem, after)
        self._before, self._after = _share_by_copy(before), _share_by_copy(after)
        self._second_rank = _second_ranks(problem, after)
        self._engines_of: dict[int, list[int]] = {}
        for a, e in self._after:
            self._engines_of.setdefault(a, []).append(e)

    def compute(self, moves: Sequence[Move]) -> list[float]:
        """Return the seconds by which each move lowers the mean predicted TTFT of all requests."""
        requests = self._problem.work.requests_per_s
        total = float(requests.sum())
        if total <= 0:
            return [0.0] * len(moves)
        index, engines = self._problem.adapter_index(), self._problem.engine_index()
        undone = [self._undo(index.get(m.version, NONE), engines, m) for m in moves]
        adapters, giver, taker, shares = (np.array(column) for column in zip(*undone, strict=True))
        saved = np.zeros(len(moves))
        only_copy = (giver != NONE) & (taker == NONE)
        cost, a = self._problem.cost, adapters[only_copy]
        # Without the only copy, every request for the adapter would load it.
        saved[only_copy] = requests[a] * (cost.load_base_s + self._problem.slab_bytes[a] * cost.load_byte_s)
        both = (giver != NONE) & (taker != NONE)
        saved[both] = self._added_waiting(adapters[both], giver[both], taker[both], shares[both])
        return [float(gain) for gain in saved / total]

    def _undo(self, adapter: int, engines: Mapping[str, int], move: Move) -> tuple[int, int, int, float]:
        """Return how to undo the move: adapter, engine that gives traffic, engine that takes it, and traffic share."""
        source, target = engines.get(move.source, NONE), engines.get(move.target, NONE)
        if adapter == NONE:
            return adapter, NONE, NONE, 0.0
        others = [e for e in self._engines_of.get(adapter, ()) if e != target]
        largest = max(others, key=lambda e: (self._after[adapter, e], -e), default=NONE)
        if target == NONE:
            return adapter, largest, source, self._before.get((adapter, source), 0.0)
        return adapter, target, source if source != NONE else largest, self._after.get((adapter, target), 0.0)

    def _added_waiting(self, a: Ints, giver: Ints, taker: Ints, shares: Floats) -> Floats:
        """Return the added requests/s * TTFT, summed over both engines, if ``giver`` gives ``shares`` to ``taker``."""
        ranks = self._problem.ranks[a].astype(np.float64)
        rank = self._work.rank
        # The giver may lose its largest rank if it gives away its whole share of the adapter.
        all_given = np.array([self._after[i, e] <= s + 1e-9 for i, e, s in zip(a, giver, shares, strict=True)], bool)
        rank_left = np.where(all_given & (ranks >= rank[giver]), self._second_rank[giver], rank[giver])
        rank_after = np.where(shares > 0, np.maximum(rank[taker], ranks), rank[taker])
        undone = self._waiting(giver, a, -shares, rank_left) + self._waiting(taker, a, shares, rank_after)
        none = np.zeros_like(shares)
        return undone - self._waiting(giver, a, none, rank[giver]) - self._waiting(taker, a, none, rank[taker])

    def _waiting(self, engine: Ints, a: Ints, shares: Floats, rank: Floats) -> Floats:
        """Return requests/s * predicted TTFT of each engine after ``shares`` of an adapter's traffic are added."""
        current, work = self._work, self._problem.work
        changed = EngineWork(
            base=current.base[engine] + shares * work.base[a],
            slope=current.slope[engine] + shares * work.slope[a],
            prefill_base=current.prefill_base[engine] + shares * work.prefill_base[a],
            prefill_slope=current.prefill_slope[engine] + shares * work.prefill_slope[a],
            requests_per_s=current.requests_per_s[engine] + shares * work.requests_per_s[a],
            rank=rank,
        )
        return changed.requests_per_s * engine_ttft_s(self._problem, changed)


class _Reasons:
    def __init__(self, problem: Problem, before: CopyShares, after: CopyShares) -> None:
        self._problem = problem
        work = engine_work(problem, before)
        self._utilisation, self._rank = work.utilisation(), work.rank
        self._second_rank = _second_ranks(problem, before)
        self._placed_before = set(before.adapters.tolist())
        self._copies = np.bincount(after.adapters, minlength=len(problem.refs))
        self._index, self._engines = problem.adapter_index(), problem.engine_index()
        self._work = problem.own_utilisation()

    def explain(self, move: Move) -> str:
        adapter = self._index.get(move.version, NONE)
        if adapter == NONE:
            return "the adapter is no longer registered"
        if not move.target:
            return "demand fits fewer copies"
        if self._engines.get(move.target, NONE) in self._problem.pins.get(adapter, ()):
            return f"it is pinned to {move.target}"
        return self._explain_move(adapter, move) if move.source else self._explain_copy(adapter)

    def _explain_move(self, adapter: int, move: Move) -> str:
        if move.source not in self._engines:
            drained = move.source in self._problem.settings.drained
            return f"{move.source} is being drained" if drained else f"{move.source} is gone"
        source, target = self._engines[move.source], self._engines[move.target]
        rank = int(self._problem.ranks[adapter])
        if self._problem.padded and self._work[adapter] > 0:
            if rank >= self._rank[source] > self._second_rank[source] > 0:
                others = int(self._second_rank[source])
                return f"its rank {rank} slows down others on {move.source}, whose ranks are at most {others}"
            if rank < self._rank[source] and self._rank[target] < self._rank[source]:
                return f"rank {int(self._rank[source])} on {move.source} slows it down; its own rank is {rank}"
        here, there = self._utilisation[source], self._utilisation[target]
        if here > there:
            return f"{move.source} would be {here:.0%} busy, {move.target} {there:.0%}"
        return f"{move.source} makes room for other adapters"

    def _explain_copy(self, adapter: int) -> str:
        if adapter not in self._placed_before:
            return "it is requested and has no copy" if self._work[adapter] > 0 else "it is registered and has no copy"
        if self._copies[adapter] <= self._problem.settings.min_copies:
            return f"every adapter has at least {self._problem.settings.min_copies} copies"
        return f"its demand takes {self._work[adapter]:.0%} of an engine, so several engines share it or its bursts"


def _share_by_copy(copies: CopyShares) -> dict[tuple[int, int], float]:
    keys = zip(copies.adapters.tolist(), copies.engines.tolist(), strict=True)
    return dict(zip(keys, copies.shares.tolist(), strict=True))


def _second_ranks(problem: Problem, copies: CopyShares) -> Floats:
    """Return each engine's largest rank with traffic after one adapter of the largest rank is removed."""
    used = problem.work.requests_per_s[copies.adapters] > 0
    ranks, engines = problem.ranks[copies.adapters[used]], copies.engines[used]
    order = np.lexsort((-ranks, engines))
    ranks, engines = ranks[order], engines[order]
    second = np.zeros(len(problem.engines))
    starts = np.searchsorted(engines, np.arange(len(second)))
    has_second = starts + 1 < np.searchsorted(engines, np.arange(len(second)), side="right")
    second[has_second] = ranks[starts[has_second] + 1]
    return second
