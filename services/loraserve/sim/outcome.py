"""The settings (``SimSettings``) and the results (``Outcome``) of a simulated run."""

from collections.abc import Iterable, Mapping
from math import ceil, inf

import msgspec

from loraserve.config import MonitorConfig, PlannerConfig

WARMUP_SHARE = 0.2
"""Fraction of the requests, from the first one on, that the outcome leaves out."""


class SimSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of a run besides its workload and policy. The default intervals are those of a real cluster.

    Attributes:
        slo_ttft_s: The SLO, a target for the P95 time to first token.
        reject_factor: The router refuses a request that would take more than this many times the SLO to start.
        report_interval_s: Time between two reports of an engine.
        plan_interval_s: Time between two plans.
        window_s: Time over which the monitor measures demand.
        hopeless: A run stops when its P95 TTFT is certain to exceed this many times the SLO; infinity disables this.
        seed: Seed of the policy's random choices.
    """

    slo_ttft_s: float = 10.0
    reject_factor: float = 4.0
    report_interval_s: float = MonitorConfig().publish_interval_s
    plan_interval_s: float = PlannerConfig().interval_s
    window_s: float = MonitorConfig().window_s
    hopeless: float = 1.5
    seed: int = 0


class RequestOutcome(msgspec.Struct, gc=False):
    index: int
    adapter: int
    arrival_s: float
    engine: str = ""
    first_token_s: float | None = None
    end_s: float | None = None
    rejected: bool = False

    @property
    def ttft_s(self) -> float:
        """Time to first token; infinite if the request was rejected or has no first token."""
        return inf if self.first_token_s is None or self.rejected else self.first_token_s - self.arrival_s


class Interval(msgspec.Struct, frozen=True):
    """The figures of the time between two plans. Tuples have one entry for each engine.

    Attributes:
        time_s: The end of the interval.
        moves: Number of copies that the plan at the start of the interval added or moved.
        needed_bytes: The part of ``held_bytes`` that the plan, a request or a load needs. The rest may be evicted.
        rank_tokens: Computed tokens by the rank of their adapter.
        adapters: Number of adapters in the pool.
    """

    time_s: float
    moves: int
    held_bytes: tuple[int, ...]
    needed_bytes: tuple[int, ...]
    rank_tokens: tuple[dict[int, int], ...]
    adapters: tuple[int, ...]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The requests, intervals and figures of a run.

    Attributes:
        slo_ttft_s: The SLO, a target for the P95 time to first token.
        hopeless: Whether the run was stopped because its P95 TTFT was certain to be far above the SLO.
        requests: Requests after the warm-up (the first ``WARMUP_SHARE`` of requests), in order of arrival.
        all_bytes: Slab bytes of all adapters together.
        busy_share: Fraction of time in which an engine computed, averaged over engines.
        whys: Number of routed requests by ``Candidate.why``.
    """

    policy: str
    engines: int
    workload: str
    rps: float
    slo_ttft_s: float
    hopeless: bool
    requests: tuple[RequestOutcome, ...]
    intervals: tuple[Interval, ...]
    all_bytes: int
    busy_share: float
    whys: Mapping[str, int]

    @property
    def p95_ttft_s(self) -> float:
        return inf if self.hopeless else percentile((r.ttft_s for r in self.requests), 0.95)

    @property
    def p50_ttft_s(self) -> float:
        return inf if self.hopeless else percentile((r.ttft_s for r in self.requests), 0.5)

    @property
    def goodput_rps(self) -> float:
        """Requests per second whose TTFT met the SLO; 0 if all requests arrived at once."""
        duration_s = self.requests[-1].arrival_s - self.requests[0].arrival_s if self.requests else 0.0
        met = sum(r.ttft_s <= self.slo_ttft_s for r in self.requests)
        return met / duration_s if duration_s > 0 else 0.0

    @property
    def decode_s(self) -> float:
        """Mean time from the first token to the end of a request, over the requests that ended."""
        times = [r.end_s - r.first_token_s for r in self.requests if r.end_s and r.first_token_s is not None]
        return sum(times) / len(times) if times else 0.0

    @property
    def rejected(self) -> int:
        return sum(r.rejected for r in self.requests)

    @property
    def bytes_share(self) -> float:
        """Fraction of all adapter bytes that an engine needs to hold, averaged over engines and intervals."""
        return self._share([i.needed_bytes for i in self.intervals])

    @property
    def held_share(self) -> float:
        """Fraction of all adapter bytes that an engine holds in its pool, averaged over engines and intervals."""
        return self._share([i.held_bytes for i in self.intervals])

    @property
    def adapters_per_engine(self) -> float:
        held = [sum(i.adapters) / len(i.adapters) for i in self.intervals[1:]]
        return sum(held) / len(held) if held else 0.0

    @property
    def moves_per_interval(self) -> float:
        """Mean number of copies that plans added or moved in an interval, without the first plan."""
        last_s = self.requests[-1].arrival_s if self.requests else 0.0
        later = [i for i in self.intervals[2:] if i.time_s <= last_s]
        return sum(i.moves for i in later) / len(later) if later else 0.0

    def _share(self, bytes_by_engine: list[tuple[int, ...]]) -> float:
        means = [sum(b) / len(b) for b in bytes_by_engine[1:]]
        return sum(means) / len(means) / self.all_bytes if means and self.all_bytes else 0.0


def percentile(values: Iterable[float], share: float) -> float:
    """Return the smallest value v such that at least a fraction ``share`` of the values are <= v; infinite if empty."""
    ordered = sorted(values)
    return ordered[max(0, ceil(share * len(ordered)) - 1)] if ordered else inf
