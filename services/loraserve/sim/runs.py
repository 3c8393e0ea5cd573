"""One simulated run as a value in and a value out, so that many can be spread over processes."""

from functools import lru_cache
from pathlib import Path

import msgspec

from loraserve.cost.profile import Profile
from loraserve.sim.cluster import SimSettings, Simulation
from loraserve.sim.outcome import Interval, Outcome
from loraserve.sim.policies import policy_named
from loraserve.sim.traces import TraceRequest, read_trace
from loraserve.sim.workload import Shape, Workload, draw, tenants_workload

LEAST_REQUESTS = 100
"""Of a run: a P95 of fewer says nothing."""


class TraceSource(msgspec.Struct, frozen=True, kw_only=True):
    """The first requests of a trace file, for so many adapters. ``requests`` 0: as the run is long."""

    path: str
    adapters: int = 100
    requests: int = 0
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{Path(self.path).name.partition('.')[0]}, {self.adapters} adapters"


Source = TraceSource | Shape


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One policy at one load. A source that names no number of requests brings them for ``duration_s``: an overload
    shows only where a run is much longer than the SLO."""

    source: Source
    policy: str
    engines: int
    rps: float
    profile: Profile
    settings: SimSettings = SimSettings()
    duration_s: float = 300.0


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of a run; see Outcome."""

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


def simulate(job: Job) -> Outcome:
    """Raises ConfigError where the trace or the policy cannot be used."""
    policy = policy_named(job.policy, job.settings.seed)
    return Simulation(workload_of(job), policy, job.profile, job.engines, job.settings).run()


def workload_of(job: Job) -> Workload:
    """At the job's load, as long as it says. Raises ConfigError where the trace cannot be used."""
    source = job.source
    if not source.requests:
        requests = max(LEAST_REQUESTS, int(job.rps * job.duration_s))
        source = msgspec.structs.replace(source, requests=requests)
    return load(source, job.profile.engine.slab_bytes_per_rank).at(job.rps)


def point(job: Job) -> Point:
    """See ``simulate``."""
    outcome = simulate(job)
    later = outcome.intervals[1:]
    held = [sum(i.adapters) / len(i.adapters) for i in later]
    return Point(
        policy=job.policy,
        engines=job.engines,
        rps=job.rps,
        p50_ttft_s=outcome.p50_ttft_s,
        p95_ttft_s=outcome.p95_ttft_s,
        goodput_rps=outcome.goodput_rps,
        decode_s=outcome.decode_s,
        busy_share=outcome.busy_share,
        bytes_share=outcome.bytes_share,
        held_share=outcome.held_share,
        adapters_per_engine=sum(held) / len(held) if held else 0.0,
        moves_per_interval=outcome.moves_per_interval,
        rejected=outcome.rejected,
        hopeless=outcome.hopeless,
        intervals=outcome.intervals,
    )


@lru_cache(maxsize=8)
def load(source: Source, slab_bytes_per_rank: int) -> Workload:
    """The workload of a source. Raises ConfigError where a trace cannot be used."""
    if isinstance(source, Shape):
        return draw(source, slab_bytes_per_rank)
    trace = _trace(source.path)
    size = source.adapters, source.requests, slab_bytes_per_rank
    return tenants_workload(trace, *size, source.name, source.seed, source.path)


@lru_cache(maxsize=1)
def _trace(path: str) -> list[TraceRequest]:
    return read_trace(path)
