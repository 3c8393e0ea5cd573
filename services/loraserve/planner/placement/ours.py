"""Where copies of adapters should live, from forecast demand: our policy, the default. Pure and deterministic.

The current plan, completed by what it lacks, stands against a fresh one: engines filled by rank to the least
utilisation (fill), where there is room for it (wishes) and taking over what they hold (relabel, packing). The fresh one
is taken where requests would start sooner by more than the hysteresis and by more than its loads cost; and then a
better one still is looked for, so that what is answered is what would be answered again.
"""

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from loraserve.cost import CostModel
from loraserve.messages import AdapterDemand, AdapterRef, EngineLoad, Placement
from loraserve.planner.placement.allocation import Holdings
from loraserve.planner.placement.assignment import kept_bytes, relabel, spilt_bytes, wishes_of
from loraserve.planner.placement.balancing import level, pieces_of
from loraserve.planner.placement.bins import Filling, fill
from loraserve.planner.placement.packing import pack
from loraserve.planner.placement.problem import (
    POOL_FRACTION,
    Copies,
    Pieces,
    PlanSettings,
    Problem,
    flat,
    placements,
    problem_of,
)
from loraserve.planner.placement.utilisation import placed_part, predicted_ttft_s, ttft_s, work_of

__all__ = ["HYSTERESIS", "POOL_FRACTION", "plan"]

HYSTERESIS = 0.05
"""Of the predicted TTFT: a plan that gains less is not worth its moves."""
LOADING_SLOWS = 0.1
"""Of a request's start on an engine that is loading: what the copying takes of its memory's speed, at most."""
PLACED = 0.01
"""Of all requests: where memory is short, a plan with copies for so many more is better whatever it costs."""
SAME = 0.001
"""Of the predicted TTFT: what differs less is the same, where it needs no more loads."""
SPILT = 20.0
"""Bytes loaded that one without room weighs: a load is paid once, and what spills over slows others at their rank for
as long as the plan lasts."""
ROUNDS = 6


def plan(
    demand: Sequence[AdapterDemand],
    adapters: Mapping[str, AdapterRef],
    engines: Sequence[EngineLoad],
    current: Sequence[Placement],
    cost: CostModel,
    settings: PlanSettings,
) -> tuple[Placement, ...]:
    """Copies by (version, engine) with their shares of traffic, which are a prior for the router."""
    problem = problem_of(demand, adapters, engines, current, cost, settings)
    if not problem.engines:
        return ()
    filling = fill(problem)
    ideal_s = predicted_ttft_s(problem, filling.pieces)
    held = problem.current
    for _ in range(ROUNDS):
        chosen = _round(problem, filling, ideal_s, held)
        if chosen.copies == held:
            break
        held = chosen.copies
    return placements(problem, chosen.pieces)


class _Candidate(msgspec.Struct):
    """Copies, their shares, what is predicted of them, what loading them costs from what is held, and the part
    of all requests whose adapters have a copy."""

    copies: Copies
    pieces: Pieces
    ttft_s: float
    loads_s: float
    placed: float


def _round(problem: Problem, filling: Filling, ideal_s: float, held: Copies) -> _Candidate:
    """The best of what is held completed, the same levelled, and a fresh one.

    Others are not looked at where what is held is within the hysteresis of a plan for which memory and moves were free.
    """
    if not any(held):
        return _candidate(problem, held, _fresh(problem, filling, held))
    kept = best = _candidate(problem, held, _kept(problem, filling, held))
    # On a guess nothing moves: a night without requests must not undo the day's plan.
    if problem.quiet or (kept.placed >= 1 - PLACED and kept.ttft_s <= ideal_s * (1 + HYSTERESIS)):
        return kept
    levelled = list(kept.copies)
    level(problem, levelled, kept.pieces)
    levelled = _refilled(problem, levelled, held)
    for copies in (levelled, _fresh(problem, filling, held)):
        if copies != best.copies:
            other = _candidate(problem, held, copies)
            best = other if _pays(problem, best, other) else best
    return best


def _candidate(problem: Problem, held: Copies, copies: Copies) -> _Candidate:
    pieces = pieces_of(problem, copies)
    return _Candidate(
        copies=copies,
        pieces=pieces,
        ttft_s=predicted_ttft_s(problem, pieces),
        loads_s=_loads_s(problem, held, pieces),
        placed=placed_part(problem, pieces),
    )


def _kept(problem: Problem, filling: Filling, held: Copies) -> Copies:
    """What is held, where it may stay, and what that lacks."""
    holdings = Holdings(problem)
    holdings.stay(held, asked=True)
    holdings.drop_surplus(filling.utilisation)
    holdings.complete(held)
    holdings.replicate(filling.utilisation, held)
    return holdings.copies


def _fresh(problem: Problem, filling: Filling, held: Copies) -> Copies:
    """What would be planned if moves cost nothing, still with as few as that allows."""
    holdings = Holdings(problem)
    engine_of, short = _dealt(problem, filling, held)
    pack(holdings, filling, engine_of, held, short)
    holdings.stay(held, asked=False)
    holdings.drop_surplus(filling.utilisation)
    holdings.complete(held)
    holdings.replicate(filling.utilisation, held)
    level(problem, holdings.copies, pieces_of(problem, holdings.copies))
    return _refilled(problem, holdings.copies, held)


def _dealt(problem: Problem, filling: Filling, held: Copies) -> tuple[list[int], frozenset[int]]:
    """By bin its engine; and the engines with less room than others, and too little for what they are to have."""
    wishes = wishes_of(filling)
    kept = kept_bytes(problem, wishes, held)
    if (problem.room_bytes == problem.room_bytes[0]).all():
        return relabel(kept).tolist(), frozenset()
    spilt = spilt_bytes(problem, wishes)
    # Of one class all bins want the same, and solving that takes longest.
    engine_of = relabel(kept - SPILT * spilt if wishes.parts.shape[1] > 1 else kept)
    short = engine_of[spilt[np.arange(len(spilt)), engine_of] > 0]
    return engine_of.tolist(), frozenset(short.tolist())


def _refilled(problem: Problem, levelled: Copies, held: Copies) -> Copies:
    """The same with what found no room before: what moved to level engines has left room behind."""
    if all(len(on) >= problem.settings.min_copies for on in levelled):
        return levelled
    holdings = Holdings(problem)
    holdings.stay(levelled, asked=True)
    holdings.complete(held)
    return holdings.copies


def _pays(problem: Problem, best: _Candidate, other: _Candidate) -> bool:
    """Whether the time that requests save until the next plan is worth the further loads, and enough to bother."""
    if abs(other.placed - best.placed) > PLACED:
        return other.placed > best.placed
    further_s = other.loads_s - best.loads_s
    least = HYSTERESIS if further_s > 0 else SAME
    if best.ttft_s <= other.ttft_s * (1 + least):
        return False
    requests = float(problem.work.requests_per_s.sum()) * problem.settings.interval_s
    return (best.ttft_s - other.ttft_s) * requests > further_s


def _loads_s(problem: Problem, held: Copies, pieces: Pieces) -> float:
    """Seconds of waiting, of all requests together, that bringing in the copies costs that are not held."""
    there, on, _ = flat(held)
    count = len(problem.engines)
    new = ~np.isin(pieces.adapters * count + pieces.engines, there * count + on)
    cost, work = problem.cost, work_of(problem, pieces)
    loads_s = cost.load_base_s + problem.slab_bytes[pieces.adapters[new]] * cost.load_byte_s
    loading_s = np.bincount(pieces.engines[new], loads_s, len(problem.engines))
    return float((loading_s * work.requests_per_s * ttft_s(problem, work)).sum()) * LOADING_SLOWS
