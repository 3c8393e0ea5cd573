"""One simulated run: its inputs (``RunSpec``) and its results (``RunFigures``).

Both are plain data, so that runs can be sent to other processes.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import msgspec

from loraserve.cost.profile import Profile
from loraserve.sim.cluster import Simulation
from loraserve.sim.outcome import Interval, SimSettings
from loraserve.sim.policies import policy_named
from loraserve.sim.traces import TraceRequest, read_trace
from loraserve.sim.workload import TraceSource, Workload, WorkloadShape, draw_workload, trace_workload

MIN_REQUESTS = 100
"""Minimum number of requests in a run. The P95 of fewer requests is not meaningful."""

Source = TraceSource | WorkloadShape


class RunSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The inputs of a run: a workload, a cluster, a policy and a request rate.

    If ``source.requests`` is 0, the run has as many requests as arrive in ``duration_s``, at least ``MIN_REQUESTS``. A
    run shows an overload only if it is much longer than the SLO.
    """

    source: Source
    policy: str
    engines: int
    rps: float
    profile: Profile
    settings: SimSettings = SimSettings()
    duration_s: float = 300.0


class RunFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of a run. The attributes of ``Outcome`` explain them."""

    policy: str
    engines: int
    rps: float
    p50_ttft_s: float
    p95_ttft_s: float
    goodput_rps: float
    decode_s: float
    busy_share: float
    bytes_share: float
    held_share: float
    adapters_per_engine: float
    moves_per_interval: float
    rejected: int
    hopeless: bool
    intervals: tuple[Interval, ...] = ()


RunAll = Callable[[Sequence[RunSpec]], list[RunFigures]]
"""Runs a batch of simulations and returns their figures in the order of the batch."""


def run_figures(spec: RunSpec) -> RunFigures:
    """Simulate a run and return its figures. Raises ConfigError if the trace or the policy cannot be used."""
    policy = policy_named(spec.policy, spec.settings.seed)
    outcome = Simulation(workload_for(spec), policy, spec.profile, spec.engines, spec.settings).run()
    computed = {name: getattr(outcome, name) for name in RunFigures.__struct_fields__}
    return RunFigures(**computed | {"rps": spec.rps})


def workload_for(spec: RunSpec) -> Workload:
    """Return the workload of a run: its requests, scaled to ``spec.rps`` requests per second."""
    source = spec.source
    if not source.requests:
        requests = max(MIN_REQUESTS, int(spec.rps * spec.duration_s))
        source = msgspec.structs.replace(source, requests=requests)
    return make_workload(source, spec.profile.engine.slab_bytes_per_rank).at(spec.rps)


@lru_cache(maxsize=8)
def make_workload(source: Source, slab_bytes_per_rank: int) -> Workload:
    """Return the workload of a source. Raises ConfigError if its trace cannot be used."""
    if isinstance(source, WorkloadShape):
        return draw_workload(source, slab_bytes_per_rank)
    return trace_workload(_cached_trace(source.path), source, slab_bytes_per_rank)


@lru_cache(maxsize=1)
def _cached_trace(path: str) -> list[TraceRequest]:
    return read_trace(path)
