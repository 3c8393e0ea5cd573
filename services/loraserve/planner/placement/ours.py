"""The default placement policy, ``ours``: separate ranks, level engines, and move only what pays.

Two kinds of plans compete: the current copies, completed by what is missing, and new plans, which fill one bin per
engine (bins.py), assign bins to engines (assignment.py) and pack whole adapters into them (packing.py), reusing held
copies where they can. A new plan is taken where it lowers the predicted TTFT by more than the hysteresis and by more
than its loads cost. This repeats from the plan found until nothing changes, so that planning again from the answer
gives the same answer.
"""

import msgspec
import numpy as np

from loraserve.messages import Placement
from loraserve.planner.placement.allocation import Allocation
from loraserve.planner.placement.assignment import choose_engines
from loraserve.planner.placement.balancing import balance_engines, split_traffic
from loraserve.planner.placement.bins import BinFilling, fill_bins
from loraserve.planner.placement.packing import pack_bins
from loraserve.planner.placement.problem import (
    CopyMap,
    CopyShares,
    PlanInput,
    Problem,
    build_problem,
    flatten,
    to_placements,
)
from loraserve.planner.placement.utilisation import engine_ttft_s, engine_work, mean_ttft_s, placed_fraction

HYSTERESIS = 0.05
"""Fraction of the predicted TTFT that a plan with further loads has to gain."""
LOADING_SLOWDOWN = 0.1
"""Fraction by which loading delays requests on an engine: the copy takes at most this part of memory bandwidth."""
PLACED_MARGIN = 0.01
"""Fraction of all requests: if memory is short, a plan with copies for so many more wins whatever its loads cost."""
MIN_GAIN = 0.001
"""Fraction of the predicted TTFT that a plan without further loads has to gain."""
FEW_ADAPTERS = 64
"""Adapters with traffic up to which plans with fewer bins are compared. More of them fill bins more exactly."""
SPARE_BINS = 2
"""Bins to leave out at most in these plans."""
MAX_ROUNDS = 6


def plan(inputs: PlanInput) -> tuple[Placement, ...]:
    """Return the copies to have, with shares of traffic that are a prior for the router."""
    problem = build_problem(inputs)
    if not problem.engines:
        return ()
    filling = fill_bins(problem, len(problem.engines))
    ideal_s = mean_ttft_s(problem, filling.shares)
    held = problem.current
    for _ in range(MAX_ROUNDS):
        chosen = _choose_plan(problem, filling, ideal_s, held)
        if chosen.copies == held:
            break
        held = chosen.copies
    return to_placements(problem, chosen.shares)


class _Candidate(msgspec.Struct):
    """Copies with their shares of traffic, and what is predicted of them.

    ``loading_s``: delay of all requests together by the loads from what is held. ``placed``: fraction of all requests
    whose adapters have a copy.
    """

    copies: CopyMap
    shares: CopyShares
    ttft_s: float
    loading_s: float
    placed: float


def _choose_plan(problem: Problem, filling: BinFilling, ideal_s: float, held: CopyMap) -> _Candidate:
    """Return the best of the held copies completed, the same balanced, and new plans.

    Held copies within the hysteresis of a plan for which memory and loads are free are not compared with others.
    """
    if not any(held):
        best = _evaluate(problem, held, _make_new_plan(problem, filling, held))
        return _try_fewer_bins(problem, best, held)
    kept = best = _evaluate(problem, held, _complete_held(problem, filling, held))
    # Without demand nothing moves: a night without requests must not undo the plan of the day.
    if problem.no_demand or (kept.placed >= 1 - PLACED_MARGIN and kept.ttft_s <= ideal_s * (1 + HYSTERESIS)):
        return kept
    balanced = list(kept.copies)
    balance_engines(problem, balanced, kept.shares)
    balanced = _fill_gaps(problem, balanced, held)
    for copies in (balanced, _make_new_plan(problem, filling, held)):
        if copies != best.copies:
            other = _evaluate(problem, held, copies)
            best = other if _is_better(problem, other, best) else best
    return _try_fewer_bins(problem, best, held)


def _try_fewer_bins(problem: Problem, best: _Candidate, held: CopyMap) -> _Candidate:
    """Return the best of the plan and of new plans with one or two bins fewer than there are engines.

    Whole adapters rarely fit bins exactly, and an adapter of a high rank that goes to the next bin slows down all that
    is there. Without this, one engine more could make a plan worse. Engines without a bin are used by balancing.
    """
    engines = len(problem.engines)
    if problem.no_demand or np.count_nonzero(problem.own_utilisation()) > FEW_ADAPTERS:
        return best
    for bins in range(engines - 1, max(0, engines - 1 - SPARE_BINS), -1):
        other = _evaluate(problem, held, _make_new_plan(problem, fill_bins(problem, bins), held))
        best = other if _is_better(problem, other, best) else best
    return best


def _evaluate(problem: Problem, held: CopyMap, copies: CopyMap) -> _Candidate:
    shares = split_traffic(problem, copies)
    return _Candidate(
        copies=copies,
        shares=shares,
        ttft_s=mean_ttft_s(problem, shares),
        loading_s=_loading_s(problem, held, shares),
        placed=placed_fraction(problem, shares),
    )


def _complete_held(problem: Problem, filling: BinFilling, held: CopyMap) -> CopyMap:
    """Return the held copies that may stay, and what is missing beside them."""
    allocation = Allocation(problem)
    allocation.keep(held)
    allocation.drop_surplus(filling.utilisation)
    allocation.complete(held)
    allocation.replicate(filling.utilisation, held)
    return allocation.copies


def _make_new_plan(problem: Problem, filling: BinFilling, held: CopyMap) -> CopyMap:
    """Return the plan for these bins as if loads cost nothing, with as few loads as that allows."""
    allocation = Allocation(problem)
    pack_bins(allocation, filling, choose_engines(problem, filling, held), held)
    allocation.keep(held, idle_only=True)
    allocation.drop_surplus(filling.utilisation)
    allocation.complete(held)
    allocation.replicate(filling.utilisation, held)
    balance_engines(problem, allocation.copies, split_traffic(problem, allocation.copies))
    return _fill_gaps(problem, allocation.copies, held)


def _fill_gaps(problem: Problem, balanced: CopyMap, held: CopyMap) -> CopyMap:
    """Return the copies and those that lacked room before balancing made some."""
    if all(len(on) >= problem.settings.min_copies for on in balanced):
        return balanced
    allocation = Allocation(problem)
    allocation.keep(balanced)
    allocation.complete(held)
    return allocation.copies


def _is_better(problem: Problem, other: _Candidate, best: _Candidate) -> bool:
    """Return whether ``other`` saves requests more time until the next plan than its further loads cost."""
    if abs(other.placed - best.placed) > PLACED_MARGIN:
        return other.placed > best.placed
    further_s = other.loading_s - best.loading_s
    min_gain = HYSTERESIS if further_s > 0 else MIN_GAIN
    if best.ttft_s <= other.ttft_s * (1 + min_gain):
        return False
    requests = float(problem.work.requests_per_s.sum()) * problem.settings.interval_s
    return (best.ttft_s - other.ttft_s) * requests > further_s


def _loading_s(problem: Problem, held: CopyMap, shares: CopyShares) -> float:
    """Return by how many seconds, summed over all requests, the loads of copies that are not held delay requests."""
    adapters, engines, _ = flatten(held)
    count = len(problem.engines)
    new = ~np.isin(shares.adapters * count + shares.engines, adapters * count + engines)
    cost, work = problem.cost, engine_work(problem, shares)
    loads_s = cost.load_base_s + problem.slab_bytes[shares.adapters[new]] * cost.load_byte_s
    loading_s = np.bincount(shares.engines[new], loads_s, len(problem.engines))
    return float((loading_s * work.requests_per_s * engine_ttft_s(problem, work)).sum()) * LOADING_SLOWDOWN
