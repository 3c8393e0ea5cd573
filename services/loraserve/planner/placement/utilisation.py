"""How busy a placement keeps each engine, and how soon requests then start. Pure.

An engine is taken for a queue with random arrivals and sizes (M/M/1) in front of its prefill, served in what time all
its work leaves: P(wait > t) = u exp(-t (1 - u) / s), u its utilisation and s a request's prefill. Kleinrock, "Queueing
Systems" (1975), 3.2. It is rough, and it is monotone: it says where waiting grows faster than balance is lost.
"""

import msgspec
import numpy as np
import numpy.typing as npt

from loraserve.planner.placement.problem import Floats, Pieces, Problem, reads_per_s

QUANTILE = 0.95
FULL = 0.98
"""Utilisation from which waiting is taken to grow along its tangent: past 1 no queue has an end, but plans have to be
compared all the same."""


class EngineWork(msgspec.Struct, frozen=True, eq=False):
    """By engine. ``rank``: the largest on it of an adapter that is asked for; the rest as in Work."""

    base: Floats
    slope: Floats
    prefill_base: Floats
    prefill_slope: Floats
    requests_per_s: Floats
    rank: Floats

    def utilisation(self) -> Floats:
        return self.base + self.rank * self.slope

    def prefill_s(self) -> Floats:
        """Of a request, alone on its engine."""
        work = self.prefill_base + self.rank * self.prefill_slope
        return np.divide(work, self.requests_per_s, out=np.zeros_like(work), where=self.requests_per_s > 0)


def work_of(problem: Problem, pieces: Pieces) -> "EngineWork":
    """What each engine has to do for its copies."""
    count, work, at = len(problem.engines), problem.work, pieces.adapters

    def total(values: Floats) -> Floats:
        return np.bincount(pieces.engines, values[at] * pieces.shares, count).astype(np.float64)

    # The decode part of slabs is concave in the share: two copies of one adapter are read by two engines.
    reads = reads_per_s(work.decode_tokens_per_s[at] * pieces.shares, problem.steps_per_s)
    together = reads_per_s(work.decode_tokens_per_s, problem.steps_per_s)[at] * pieces.shares
    apart = np.bincount(pieces.engines, work.slab_read[at] * (reads - together), count)
    rank = np.zeros(count)
    heard = (pieces.shares * work.requests_per_s[at]) > 0
    np.maximum.at(rank, pieces.engines[heard], problem.ranks[at][heard].astype(np.float64))
    return EngineWork(
        base=total(work.base) + apart,
        slope=total(work.slope),
        prefill_base=total(work.prefill_base),
        prefill_slope=total(work.prefill_slope),
        requests_per_s=total(work.requests_per_s),
        rank=rank,
    )


def ttft_s(problem: Problem, engines: EngineWork) -> Floats:
    """Predicted P95 TTFT of each engine."""
    return ttft_of(problem, engines.utilisation(), engines.prefill_s())


def ttft_of(problem: Problem, utilisation: Floats, prefill_s: Floats) -> Floats:
    """The same from what it depends on: waiting, the request's own prefill, and the step that it comes into."""
    cost, tail = problem.cost, 1 - QUANTILE
    busy = np.clip(utilisation, tail, FULL)
    wait = np.log(busy / tail) / (1 - busy)
    slope = 1 / (FULL * (1 - FULL)) + np.log(FULL / tail) / (1 - FULL) ** 2
    wait = wait + np.maximum(utilisation - FULL, 0) * slope
    step_s = cost.step_base_s + np.minimum(utilisation, 1) * problem.batch * cost.sequence_s
    result: Floats = prefill_s * (1 + wait) + step_s
    return result


def predicted_ttft_s(problem: Problem, pieces: Pieces) -> float:
    """Of the whole: the mean over requests of their engine's P95. 0 where nothing is asked for.

    A mean, so that an engine drowning with one request in thirty counts, as it would not in a P95 over all. An adapter
    without a copy is loaded when it is asked for, on an engine like the mean one.
    """
    engines = work_of(problem, pieces)
    requests = problem.work.requests_per_s
    total = float(requests.sum())
    if total <= 0:
        return 0.0
    waited = float((engines.requests_per_s * ttft_s(problem, engines)).sum())
    placed = _placed(problem, pieces)
    served = float(requests[placed].sum())
    if served >= total * (1 - 1e-9):
        return waited / total
    cost = problem.cost
    sizes = problem.slab_bytes[~placed]
    loads = float((requests[~placed] * (cost.load_base_s + sizes * cost.load_byte_s)).sum())
    everywhere = waited / served if served > 0 else 0.0
    return (waited + (total - served) * everywhere + loads) / total


def placed_part(problem: Problem, pieces: Pieces) -> float:
    """Of all requests, those whose adapters have a copy."""
    requests = problem.work.requests_per_s
    total = float(requests.sum())
    return float(requests[_placed(problem, pieces)].sum()) / total if total > 0 else 1.0


def _placed(problem: Problem, pieces: Pieces) -> npt.NDArray[np.bool_]:
    return np.bincount(pieces.adapters, minlength=len(problem.versions)) > 0
