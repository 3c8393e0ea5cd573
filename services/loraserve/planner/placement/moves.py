"""What each move is worth, and why it is made: predicted with the plan's own model. Pure."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property

import msgspec
import numpy as np

from loraserve.cost import CostModel
from loraserve.messages import AdapterDemand, AdapterRef, EngineLoad, Move, Placement
from loraserve.planner.placement.problem import Floats, Ints, Pieces, PlanSettings, Problem, problem_of
from loraserve.planner.placement.utilisation import ttft_of, work_of

NOWHERE = -1


class Outlook:
    """What is expected, for pricing moves. Reckoned when the first move is to be priced: most plans move nothing."""

    def __init__(self, problem: Callable[[], Problem]) -> None:
        self._make_problem = problem

    @cached_property
    def problem(self) -> Problem:
        return self._make_problem()

    def priced(self, moves: Sequence[Move], current: Sequence[Placement], target: Sequence[Placement]) -> list[Move]:
        """The moves, each with its gain beside all the others: what the target plan predicts without it, less what it
        predicts with it. A copy that only goes frees memory, and its gain may be a little below 0."""
        if not moves:
            return []
        before, after = self._pieces(current), self._pieces(target)
        gains = _Gains(self.problem, before, after).of(moves)
        reasons = _Reasons(self.problem, before, after)
        return [
            msgspec.structs.replace(move, gain_s=gain, reason=reasons.of(move) or move.reason)
            for move, gain in zip(moves, gains, strict=True)
        ]

    def _pieces(self, placements: Sequence[Placement]) -> Pieces:
        index, engines = self.problem.index(), self.problem.engine_index()
        known = [p for p in placements if p.version in index and p.engine in engines]
        return Pieces(
            np.array([index[p.version] for p in known], np.int64),
            np.array([engines[p.engine] for p in known], np.int64),
            np.array([p.share for p in known], np.float64),
        )


def outlook(
    demand: Sequence[AdapterDemand],
    adapters: Mapping[str, AdapterRef],
    engines: Sequence[EngineLoad],
    cost: CostModel,
    settings: PlanSettings,
) -> Outlook:
    """Of the same that a plan is made from."""
    return Outlook(lambda: problem_of(demand, adapters, engines, (), cost, settings))


class _Gains:
    """All moves at once: each is undone alone, in the work of the two engines that it touches."""

    def __init__(self, problem: Problem, before: Pieces, after: Pieces) -> None:
        self._problem = problem
        self._work = work_of(problem, after)
        self._before, self._after = _shares(before), _shares(after)
        self._second = _second_ranks(problem, after)
        self._others: dict[int, list[int]] = {}
        for a, e in self._after:
            self._others.setdefault(a, []).append(e)

    def of(self, moves: Sequence[Move]) -> list[float]:
        """Seconds, over all requests."""
        requests = self._problem.work.requests_per_s
        total = float(requests.sum())
        if not moves or total <= 0:
            return [0.0] * len(moves)
        index, engines = self._problem.index(), self._problem.engine_index()
        undone = [self._undone(index.get(m.version, NOWHERE), engines, m) for m in moves]
        adapters, giver, taker, shares = (np.array(column) for column in zip(*undone, strict=True))
        saved = np.zeros(len(moves))
        loads = (giver != NOWHERE) & (taker == NOWHERE)
        cost, a = self._problem.cost, adapters[loads]
        # Without this only copy each request would find it absent.
        saved[loads] = requests[a] * (cost.load_base_s + self._problem.slab_bytes[a] * cost.load_byte_s)
        both = (giver != NOWHERE) & (taker != NOWHERE)
        saved[both] = self._shifted(adapters[both], giver[both], taker[both], shares[both])
        return [float(gain) for gain in saved / total]

    def _undone(self, adapter: int, engines: Mapping[str, int], move: Move) -> tuple[int, int, int, float]:
        """Whose traffic, from which engine, to which, how much of it, if the move were not made."""
        source, target = engines.get(move.source, NOWHERE), engines.get(move.target, NOWHERE)
        if adapter == NOWHERE:
            return adapter, NOWHERE, NOWHERE, 0.0
        others = [e for e in self._others.get(adapter, ()) if e != target]
        most = max(others, key=lambda e: (self._after[adapter, e], -e), default=NOWHERE)
        if target == NOWHERE:
            return adapter, most, source, self._before.get((adapter, source), 0.0)
        return adapter, target, source if source != NOWHERE else most, self._after.get((adapter, target), 0.0)

    def _shifted(self, a: Ints, giver: Ints, taker: Ints, shares: Floats) -> Floats:
        """Seconds a second, of all requests on both engines, that moving the traffic there would add."""
        ranks = self._problem.ranks[a].astype(np.float64)
        rank = self._work.rank
        # Moves take all that the giver has of it, and so perhaps its largest rank; what goes leaves some there.
        whole = np.array([self._after[i, e] <= s + 1e-9 for i, e, s in zip(a, giver, shares, strict=True)], bool)
        left = np.where(whole & (ranks >= rank[giver]), self._second[giver], rank[giver])
        got = np.where(shares > 0, np.maximum(rank[taker], ranks), rank[taker])
        undone = self._waiting(giver, a, -shares, left) + self._waiting(taker, a, shares, got)
        none = np.zeros_like(shares)
        return undone - self._waiting(giver, a, none, rank[giver]) - self._waiting(taker, a, none, rank[taker])

    def _waiting(self, engine: Ints, a: Ints, shares: Floats, rank: Floats) -> Floats:
        now, work = self._work, self._problem.work
        requests = np.maximum(now.requests_per_s[engine] + shares * work.requests_per_s[a], 0.0)
        base = now.base[engine] + shares * work.base[a]
        slope = now.slope[engine] + shares * work.slope[a]
        prefill = now.prefill_base[engine] + shares * work.prefill_base[a]
        prefill = prefill + rank * (now.prefill_slope[engine] + shares * work.prefill_slope[a])
        each_s = np.divide(prefill, requests, out=np.zeros_like(prefill), where=requests > 1e-12)
        return requests * ttft_of(self._problem, np.maximum(base + rank * slope, 0.0), np.maximum(each_s, 0.0))


class _Reasons:
    """In words, with the figures that the decision was made on."""

    def __init__(self, problem: Problem, before: Pieces, after: Pieces) -> None:
        self._problem = problem
        work = work_of(problem, before)
        self._busy, self._rank = work.utilisation(), work.rank
        self._second = _second_ranks(problem, before)
        self._held = set(before.adapters.tolist())
        self._copies = np.bincount(after.adapters, minlength=len(problem.versions))
        self._index, self._engines, self._whole = problem.index(), problem.engine_index(), problem.whole()

    def of(self, move: Move) -> str:
        """ "" where there is nothing better to say."""
        adapter = self._index.get(move.version, NOWHERE)
        if adapter == NOWHERE or not move.target:
            return ""
        if self._engines[move.target] in self._problem.pins.get(adapter, ()):
            return f"it is pinned to {move.target}"
        return self._moved(adapter, move) if move.source else self._appeared(adapter)

    def _moved(self, adapter: int, move: Move) -> str:
        if move.source not in self._engines:
            drained = move.source in self._problem.settings.drained
            return f"{move.source} is being drained" if drained else f"{move.source} is gone"
        source, target = self._engines[move.source], self._engines[move.target]
        rank = int(self._problem.ranks[adapter])
        if self._problem.padded and self._whole[adapter] > 0:
            if rank >= self._rank[source] > self._second[source] > 0:
                return f"its rank {rank} slows others on {move.source}, of rank {int(self._second[source])} at most"
            if rank < self._rank[source] and self._rank[target] < self._rank[source]:
                return f"rank {int(self._rank[source])} on {move.source} slows it, rank {rank}"
        here, there = self._busy[source], self._busy[target]
        if here > there:
            return f"{move.source} would be {here:.0%} busy, {move.target} {there:.0%}"
        return f"{move.source} makes room for others"

    def _appeared(self, adapter: int) -> str:
        if adapter not in self._held:
            asked = self._whole[adapter] > 0
            return "asked for and planned nowhere yet" if asked else "registered and planned nowhere yet"
        if self._copies[adapter] <= self._problem.settings.min_copies:
            return f"there are to be {self._problem.settings.min_copies} copies at least"
        busy = self._whole[adapter]
        return f"demand takes {busy:.0%} of an engine: several share it, or its bursts"


def _shares(pieces: Pieces) -> dict[tuple[int, int], float]:
    at = zip(pieces.adapters.tolist(), pieces.engines.tolist(), strict=True)
    return dict(zip(at, pieces.shares.tolist(), strict=True))


def _second_ranks(problem: Problem, pieces: Pieces) -> Floats:
    """By engine, the largest rank that is left without one adapter of the largest."""
    asked = problem.work.requests_per_s[pieces.adapters] > 0
    ranks, engines = problem.ranks[pieces.adapters[asked]], pieces.engines[asked]
    order = np.lexsort((-ranks, engines))
    ranks, engines = ranks[order], engines[order]
    second = np.zeros(len(problem.engines))
    starts = np.searchsorted(engines, np.arange(len(second)))
    has = starts + 1 < np.searchsorted(engines, np.arange(len(second)), side="right")
    second[has] = ranks[starts[has] + 1]
    return second


def diff(
    current: Sequence[Placement],
    target: Sequence[Placement],
    adapters: Mapping[str, AdapterRef],
    outlook: Outlook | None = None,
) -> list[Move]:
    """Copies that appear, go, or change places: one that appears is paired with one of the same adapter that goes.

    With an outlook each has its predicted gain and a reason with figures; without, a reason that needs none.
    """
    before, after = _engines(current), _engines(target)
    names = {p.version: p.name for p in (*current, *target)}
    moves: list[Move] = []
    for version in sorted(before.keys() | after.keys(), key=lambda v: (names[v], v)):
        gone = sorted(before.get(version, set()) - after.get(version, set()))
        new = sorted(after.get(version, set()) - before.get(version, set()))
        slab_bytes = adapters[version].slab_bytes if version in adapters else 0
        for index in range(max(len(gone), len(new))):
            source = gone[index] if index < len(gone) else ""
            goal = new[index] if index < len(new) else ""
            reason = _reason(source, goal, version in adapters, bool(before.get(version)))
            moves.append(
                Move(
                    version=version,
                    name=names[version],
                    source=source,
                    target=goal,
                    slab_bytes=slab_bytes if goal else 0,
                    reason=reason,
                )
            )
    return outlook.priced(moves, current, target) if outlook else moves


def _engines(placements: Iterable[Placement]) -> dict[str, set[str]]:
    engines: dict[str, set[str]] = {}
    for placement in placements:
        engines.setdefault(placement.version, set()).add(placement.engine)
    return engines


def _reason(source: str, goal: str, registered: bool, planned_before: bool) -> str:
    if source and goal:
        return f"{goal} carries less than {source}"
    if goal:
        return "demand is more than one engine's share" if planned_before else "asked for and planned nowhere yet"
    return "demand fits fewer copies" if registered else "the adapter is no longer registered"
