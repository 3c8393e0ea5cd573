"""The default placement policy separates ranks, balances engines, and moves copies only if the gain exceeds the cost.

The policy compares new plans with the held copies (copies of the current plan) plus missing copies. A new plan
divides the work into one bin per engine and assigns the bins to engines (bins.py). It then packs adapters into the
bins (packing.py), and reuses held copies where possible. A plan with additional loads wins if it lowers the predicted
TTFT by more than ``HYSTERESIS``, and if requests save more time than the loads cost them. The comparison repeats from
the chosen plan until no copy changes, at most ``MAX_ROUNDS`` times. Planning again then usually gives an equal plan.
"""

import msgspec
import numpy as np

from loraserve.messages import Placement
from loraserve.planner.placement.allocation import Allocation
from loraserve.planner.placement.balancing import balance_engines, split_traffic
from loraserve.planner.placement.bins import BinFilling, choose_engines, fill_bins
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
"""Least relative gain in predicted TTFT of a plan with additional loads."""
LOADING_SLOWDOWN = 0.1
"""Fraction by which a load delays requests on its engine. Its copy takes at most this fraction of the bandwidth."""
PLACED_MARGIN = 0.01
"""A plan that has copies for this fraction more of all requests wins, regardless of the cost of its loads."""
MIN_GAIN = 0.001
"""Least relative gain in predicted TTFT of a plan without additional loads."""
FEW_ADAPTERS = 64
"""Most adapters with traffic for which plans with fewer bins are tried. More adapters fill bins more exactly."""
SPARE_BINS = 2
"""Maximum number of bins to leave out in plans with fewer bins."""
MAX_ROUNDS = 6


def plan(inputs: PlanInput) -> tuple[Placement, ...]:
    """Return the copies that should exist, with shares of traffic. The router may deviate from these shares."""
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
    """A possible plan: copies, their shares of traffic, and predictions.

    ``loading_s``: total delay of all requests, in seconds, while engines load copies that are not held now. ``placed``:
    fraction of requests whose adapter has a copy.
    """

    copies: CopyMap
    shares: CopyShares
    ttft_s: float
    loading_s: float
    placed: float


def _choose_plan(problem: Problem, filling: BinFilling, ideal_s: float, held: CopyMap) -> _Candidate:
    """Return the best of: held plus missing copies, held plus missing copies after balancing, and new plans.

    Only new plans are compared if no copy is held. Held copies do not move without demand, or if their TTFT is near
    ``ideal_s`` (the TTFT of a plan without limits on memory and loads) and nearly all requests have a copy.
    """
    if not any(held):
        best = _evaluate(problem, held, _make_new_plan(problem, filling, held))
        return _try_fewer_bins(problem, best, held)
    kept = best = _evaluate(problem, held, _complete_held(problem, filling, held))
    # Without demand no copy moves, so that a night without requests does not undo the plan of the day.
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
    """Return ``best``, or a better plan with up to ``SPARE_BINS`` fewer bins than engines (tried for few adapters).

    Whole adapters rarely fit bins exactly. An adapter of a high rank that overflows into the next bin slows down all
    adapters there, so an additional bin can make a plan worse. Balancing then uses the engines without a bin.
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
    """Return the held copies without surplus copies, with missing copies and second copies of hot adapters added."""
    allocation = Allocation(problem)
    allocation.keep(held)
    allocation.drop_surplus(filling.utilisation)
    allocation.complete(held)
    allocation.replicate(filling.utilisation, held)
    return allocation.copies


def _make_new_plan(problem: Problem, filling: BinFilling, held: CopyMap) -> CopyMap:
    """Return a new plan for these bins. The cost of loads is ignored, but held copies are reused where possible."""
    allocation = Allocation(problem)
    pack_bins(allocation, filling, choose_engines(problem, filling, held), held)
    allocation.keep(held, idle_only=True)
    allocation.drop_surplus(filling.utilisation)
    allocation.complete(held)
    allocation.replicate(filling.utilisation, held)
    balance_engines(problem, allocation.copies, split_traffic(problem, allocation.copies))
    return _fill_gaps(problem, allocation.copies, held)


def _fill_gaps(problem: Problem, balanced: CopyMap, held: CopyMap) -> CopyMap:
    """Return the balanced copies and missing copies that fit only after balancing has freed memory."""
    if all(len(on) >= problem.settings.min_copies for on in balanced):
        return balanced
    allocation = Allocation(problem)
    allocation.keep(balanced)
    allocation.complete(held)
    return allocation.copies


def _is_better(problem: Problem, other: _Candidate, best: _Candidate) -> bool:
    """Return whether ``other`` has copies for more requests, or a sufficient gain that outweighs its further loads."""
    if abs(other.placed - best.placed) > PLACED_MARGIN:
        return other.placed > best.placed
    further_s = other.loading_s - best.loading_s
    min_gain = HYSTERESIS if further_s > 0 else MIN_GAIN
    if best.ttft_s <= other.ttft_s * (1 + min_gain):
        return False
    requests = float(problem.work.requests_per_s.sum()) * problem.settings.interval_s
    return (best.ttft_s - other.ttft_s) * requests > further_s


def _loading_s(problem: Problem, held: CopyMap, shares: CopyShares) -> float:
    """Return the total delay of all requests, in seconds, while engines load the copies that are not in ``held``."""
    adapters, engines, _ = flatten(held)
    count = len(problem.engines)
    new = ~np.isin(shares.adapters * count + shares.engines, adapters * count + engines)
    cost, work = problem.cost, engine_work(problem, shares)
    loads_s = cost.load_base_s + problem.slab_bytes[shares.adapters[new]] * cost.load_byte_s
    loading_s = np.bincount(shares.engines[new], loads_s, len(problem.engines))
    return float((loading_s * work.requests_per_s * engine_ttft_s(problem, work)).sum()) * LOADING_SLOWDOWN
