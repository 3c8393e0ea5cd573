"""Where copies of adapters should live, from forecast demand: our policy, the default. Pure and deterministic.

The current plan, completed by what it lacks, stands against a fresh one: engines filled by rank to the least
utilisation (fill), taking over what they hold (relabel, packing). The fresh one is taken where requests would start
sooner by more than the hysteresis and by more than its loads cost; and then a better one still is looked for, so that
what is answered is what would be answered again.
"""

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from loraserve.cost import CostModel
from loraserve.messages import AdapterDemand, AdapterRef, EngineLoad, Placement
from loraserve.planner.fill import Filling, fill
from loraserve.planner.levelling import level
from loraserve.planner.packing import Packer
from loraserve.planner.problem import POOL_FRACTION, Copies, Floats, Pieces, Problem, placements, problem_of
from loraserve.planner.relabel import relabel
from loraserve.planner.settings import PlanSettings
from loraserve.planner.shares import pieces_of
from loraserve.planner.utilisation import predicted_ttft_s, ttft_s, work_of

__all__ = ["HYSTERESIS", "POOL_FRACTION", "plan"]

HYSTERESIS = 0.05
"""Of the predicted TTFT: a plan that gains less is not worth its moves."""
LOADING_SLOWS = 0.1
"""Of a request's start on an engine that is loading: what the copying takes of its memory's speed, at most."""
SAME = 0.001
"""Of the predicted TTFT: what differs less is the same, where it needs no more loads."""
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
    held = problem.current
    for _ in range(ROUNDS):
        chosen, stays = _round(problem, filling, held)
        held = chosen.copies
        if stays:
            break
    return placements(problem, chosen.pieces)


class _Candidate(msgspec.Struct):
    """Copies, their shares, what is predicted of them, and what loading them costs from what is held."""

    copies: Copies
    pieces: Pieces
    ttft_s: float
    loads_s: float


def _round(problem: Problem, filling: Filling, held: Copies) -> tuple[_Candidate, bool]:
    """The best of what is held completed, the same levelled, and a fresh one; and whether it is the first."""
    kept = best = _candidate(problem, held, _kept(problem, filling, held))
    if kept.ttft_s <= 0:
        return kept, True
    levelled = [list(on) for on in kept.copies]
    level(problem, levelled, kept.pieces)
    for copies in (levelled, _fresh(problem, filling, held)):
        if copies != best.copies:
            other = _candidate(problem, held, copies)
            best = other if _pays(problem, best, other) else best
    return best, best is kept


def _candidate(problem: Problem, held: Copies, copies: Copies) -> _Candidate:
    pieces = pieces_of(problem, copies)
    return _Candidate(
        copies=copies,
        pieces=pieces,
        ttft_s=predicted_ttft_s(problem, pieces),
        loads_s=_loads_s(problem, held, pieces),
    )


def _kept(problem: Problem, filling: Filling, held: Copies) -> Copies:
    """What is held, where it may stay, and what that lacks."""
    packer = _pinned(problem)
    packer.stay(held, asked=True)
    packer.drop_surplus(filling.utilisation)
    packer.complete(held)
    packer.replicate(filling.utilisation, held)
    return packer.copies


def _fresh(problem: Problem, filling: Filling, held: Copies) -> Copies:
    """What would be planned if moves cost nothing, still with as few as that allows."""
    packer = _pinned(problem)
    packer.pack(filling, relabel(_kept_bytes(problem, filling, held)).tolist(), held)
    packer.stay(held, asked=False)
    packer.drop_surplus(filling.utilisation)
    packer.complete(held)
    packer.replicate(filling.utilisation, held)
    level(problem, packer.copies, pieces_of(problem, packer.copies))
    return packer.copies


def _pinned(problem: Problem) -> Packer:
    packer = Packer(problem, [[] for _ in problem.versions])
    packer.pin()
    return packer


def _kept_bytes(problem: Problem, filling: Filling, held: Copies) -> Floats:
    """By bin and engine: bytes held there of the classes that the bin wants, each by the part of it that it wants."""
    classes = {kind: i for i, kind in enumerate(sorted({kind for part in filling.bins for kind in part.budgets}))}
    wanted = np.zeros((len(filling.bins), len(classes)))
    for i, part in enumerate(filling.bins):
        for kind, budget in part.budgets.items():
            wanted[i, classes[kind]] = budget
    wanted /= np.maximum(wanted.sum(axis=0), 1e-300)
    holds = np.zeros((len(classes), len(problem.engines)))
    at = [(classes[filling.class_of[a]], e, a) for a, on in enumerate(held) if filling.class_of[a] >= 0 for e in on]
    if at:
        kinds, engines, adapters = np.array(at).T
        np.add.at(holds, (kinds, engines), problem.extents[adapters])
    result: Floats = wanted @ holds
    return result


def _pays(problem: Problem, best: _Candidate, other: _Candidate) -> bool:
    """Whether the time that requests save until the next plan is worth the further loads, and enough to bother."""
    further_s = other.loads_s - best.loads_s
    least = HYSTERESIS if further_s > 0 else SAME
    if best.ttft_s <= other.ttft_s * (1 + least):
        return False
    requests = float(problem.work.requests_per_s.sum()) * problem.settings.interval_s
    return (best.ttft_s - other.ttft_s) * requests > further_s


def _loads_s(problem: Problem, held: Copies, pieces: Pieces) -> float:
    """Seconds of waiting, of all requests together, that bringing in the copies costs that are not held."""
    new = np.array(
        [e not in held[a] for a, e in zip(pieces.adapters.tolist(), pieces.engines.tolist(), strict=True)], bool
    )
    cost, work = problem.cost, work_of(problem, pieces)
    loads_s = cost.load_base_s + problem.slab_bytes[pieces.adapters[new]] * cost.load_byte_s
    loading_s = np.bincount(pieces.engines[new], loads_s, len(problem.engines))
    return float((loading_s * work.requests_per_s * ttft_s(problem, work)).sum()) * LOADING_SLOWS
