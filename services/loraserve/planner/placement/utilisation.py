"""Predictions of the utilisation and TTFT of engines under a placement.

Requests wait for prefill in an M/M/1 queue: P(wait > t) = u exp(-t (1 - u) / s), where u is the engine's utilisation by
all its work and s the prefill time of a request (Kleinrock, "Queueing Systems", 1975, section 3.2). The model is rough.
It increases monotonically with utilisation, which suffices to compare plans.
"""

import msgspec
import numpy as np
import numpy.typing as npt

from loraserve.planner.placement.problem import CopyShares, Floats, Problem, reads_per_s

QUANTILE = 0.95
LINEAR_FROM = 0.98
"""Above this utilisation, waiting follows its tangent, so that plans with overloaded engines stay comparable."""


class EngineWork(msgspec.Struct, frozen=True, eq=False):
    """Sums of ``AdapterWork`` over the copies on each engine. ``rank``: by engine, the largest rank with traffic."""

    base: Floats
    slope: Floats
    prefill_base: Floats
    prefill_slope: Floats
    requests_per_s: Floats
    rank: Floats

    def utilisation(self) -> Floats:
        return self.base + self.rank * self.slope

    def prefill_s(self) -> Floats:
        """Return by engine the mean prefill time, in seconds, of a request that runs alone."""
        work = self.prefill_base + self.rank * self.prefill_slope
        return np.divide(work, self.requests_per_s, out=np.zeros_like(work), where=self.requests_per_s > 0)


def engine_work(problem: Problem, copies: CopyShares) -> EngineWork:
    count, work, a = len(problem.engines), problem.work, copies.adapters

    def total(values: Floats) -> Floats:
        return np.bincount(copies.engines, values[a] * copies.shares, count).astype(np.float64)

    # The rate of slab reads is concave in the share, because each engine with a copy reads its own slab.
    reads = reads_per_s(work.decode_tokens_per_s[a] * copies.shares, problem.steps_per_s)
    reads_of_one = reads_per_s(work.decode_tokens_per_s, problem.steps_per_s)[a] * copies.shares
    extra_reads = np.bincount(copies.engines, work.slab_read[a] * (reads - reads_of_one), count)
    rank = np.zeros(count)
    used = (copies.shares * work.requests_per_s[a]) > 0
    np.maximum.at(rank, copies.engines[used], problem.ranks[a][used].astype(np.float64))
    return EngineWork(
        base=total(work.base) + extra_reads,
        slope=total(work.slope),
        prefill_base=total(work.prefill_base),
        prefill_slope=total(work.prefill_slope),
        requests_per_s=total(work.requests_per_s),
        rank=rank,
    )


def engine_ttft_s(problem: Problem, engines: EngineWork) -> Floats:
    return predict_ttft_s(problem, engines.utilisation(), engines.prefill_s())


def predict_ttft_s(problem: Problem, utilisation: Floats, prefill_s: Floats) -> Floats:
    """Return the P95 TTFT in seconds: waiting, the request's own prefill, and the step in progress at arrival."""
    cost, tail = problem.cost, 1 - QUANTILE
    busy = np.clip(utilisation, tail, LINEAR_FROM)
    wait = np.log(busy / tail) / (1 - busy)
    slope = 1 / (LINEAR_FROM * (1 - LINEAR_FROM)) + np.log(LINEAR_FROM / tail) / (1 - LINEAR_FROM) ** 2
    wait = wait + np.maximum(utilisation - LINEAR_FROM, 0) * slope
    step_s = cost.step_base_s + np.minimum(utilisation, 1) * problem.batch * cost.sequence_s
    result: Floats = prefill_s * (1 + wait) + step_s
    return result


def mean_ttft_s(problem: Problem, copies: CopyShares) -> float:
    """Return the mean over all requests of their engine's predicted P95 TTFT in seconds, or 0 without requests.

    The mean reflects an overloaded engine even if it serves one request in thirty. A P95 over all requests would not.
    A request for an adapter without a copy is assumed to take the mean TTFT plus the time of the load.
    """
    engines = engine_work(problem, copies)
    requests = problem.work.requests_per_s
    total = float(requests.sum())
    if total <= 0:
        return 0.0
    waited = float((engines.requests_per_s * engine_ttft_s(problem, engines)).sum())
    placed = _has_copy(problem, copies)
    served = float(requests[placed].sum())
    if served >= total * (1 - 1e-9):
        return waited / total
    cost = problem.cost
    sizes = problem.slab_bytes[~placed]
    loads = float((requests[~placed] * (cost.load_base_s + sizes * cost.load_byte_s)).sum())
    mean_s = waited / served if served > 0 else 0.0
    return (waited + (total - served) * mean_s + loads) / total


def placed_fraction(problem: Problem, copies: CopyShares) -> float:
    """Return the fraction of all requests whose adapter has a copy; 1 without requests."""
    requests = problem.work.requests_per_s
    total = float(requests.sum())
    return float(requests[_has_copy(problem, copies)].sum()) / total if total > 0 else 1.0


def _has_copy(problem: Problem, copies: CopyShares) -> npt.NDArray[np.bool_]:
    return np.bincount(copies.adapters, minlength=len(problem.refs)) > 0
