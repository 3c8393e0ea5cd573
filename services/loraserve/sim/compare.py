"""Compares policies: finds the highest request rate that each serves under the SLO, and their figures at equal rates.

``capacity_rps`` estimates the rate at which the search starts. ``limit_rps`` is an upper bound of the highest rate for
every policy. Runs are requested in batches. The runs of a batch are independent, so they can run in parallel.
"""

from collections.abc import Sequence
from math import ceil, inf
from typing import NamedTuple

import msgspec

from loraserve.cost import StepShape
from loraserve.cost.derived import derive_profile
from loraserve.cost.hardware import HARDWARE
from loraserve.cost.profile import Profile
from loraserve.errors import ConfigError
from loraserve.messages import AdapterRef
from loraserve.sim.policies import DEFAULT_POLICY, policy_named
from loraserve.sim.runs import RunAll, RunFigures, RunSpec
from loraserve.sim.workload import SimRequest, Workload

LOAD_SHARES = (0.3, 0.6, 0.8, 1.0, 1.2)
"""The request rates at which all policies are compared, as fractions of the best baseline's highest rate."""
PRECISION = 0.02
"""Relative precision of the highest request rate."""
MAX_ENGINE_FACTOR = 3
"""The search for the number of engines tries at most this many times the engines of the comparison."""
FIRST_FACTOR = 1.3
LATER_FACTOR = 4.0
NEARBY_TRIES = 4
MAX_TRIES = 12
MAX_GUESS_ERROR = 200.0
"""A search stops when the request rate falls below the estimated capacity divided by this."""
EFFICIENCY_FACTORS = (0.5, 2.0)


class CompareOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of a comparison.

    Attributes:
        shares: The request rates to compare at, as fractions of the best baseline's highest rate. One must be 0.8.
        count_engines: Whether to search for the number of engines that each policy needs.
        draws: Number of draws of a random placement. The draw with the median highest rate is compared.
    """

    shares: tuple[float, ...] = LOAD_SHARES
    count_engines: bool = True
    draws: int = 1


class PolicyDraw(NamedTuple):
    """A policy and the seed of its runs. Only policies with a random placement have several draws."""

    policy: str
    seed: int


Curves = dict[PolicyDraw, dict[float, RunFigures]]
"""Figures by draw, then by request rate in requests/s."""


class PolicyResult(msgspec.Struct, frozen=True, kw_only=True):
    """The results of one policy, or of its median draw.

    Attributes:
        max_rps: The highest request rate under the SLO, in requests/s.
        max_rps_draws: The ``max_rps`` of all draws in ascending order.
        at_80pct: Figures at 80% of the best baseline's ``max_rps``.
        engines_needed: Engines needed for the best baseline's ``max_rps``; None if not found or not searched.
        curve: Figures of all runs in ascending order of request rate.
    """

    max_rps: float
    max_rps_draws: tuple[float, ...]
    at_80pct: RunFigures
    engines_needed: int | None
    curve: tuple[RunFigures, ...]


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """The results of all policies on one workload with the same number of engines."""

    engines: int
    slo_ttft_s: float
    best_baseline: str
    best_baseline_rps: float
    shares: tuple[float, ...]
    results: dict[str, PolicyResult]

    def gain_over(self, rps: float) -> float:
        """Return the default policy's highest request rate under the SLO, divided by ``rps``."""
        return self.results[DEFAULT_POLICY].max_rps / (rps or 1e-9)

    def p95_at(self, policy: str, share: float) -> float:
        """Return a policy's P95 TTFT at one of the ``shares`` of the best baseline's highest request rate."""
        rps = share * self.best_baseline_rps
        return next(p.p95_ttft_s for p in self.results[policy].curve if abs(p.rps - rps) < 1e-6 * rps)


def compare(
    base: RunSpec, policies: Sequence[str], guess_rps: float, run_all: RunAll, options: CompareOptions
) -> Comparison:
    """Compare policies on the workload, engines and profile of ``base``. Searches start at ``guess_rps``.

    Raises ConfigError if no baseline meets the SLO at any request rate.
    """
    seed, slo_s = base.settings.seed, base.settings.slo_ttft_s
    counts = {policy: options.draws if policy_named(policy).random_placement else 1 for policy in policies}
    draws_of = {policy: [PolicyDraw(policy, seed + i) for i in range(count)] for policy, count in counts.items()}
    curves: Curves = {draw: {} for draws in draws_of.values() for draw in draws}
    largest_of = find_largest(base, guess_rps, run_all, curves)
    # The median draw by largest load represents its policy. For an even number of draws it is the lower median.
    chosen = {
        policy: sorted(draws, key=lambda draw: largest_of[draw])[(len(draws) - 1) // 2]
        for policy, draws in draws_of.items()
    }
    baselines = [policy for policy in policies if policy != DEFAULT_POLICY] or list(policies)
    best = max(baselines, key=lambda policy: largest_of[chosen[policy]])
    best_rps = largest_of[chosen[best]]
    if not best_rps:
        raise ConfigError(f"no baseline meets a P95 TTFT of {slo_s} s at any load; allow a longer one with --slo-s")
    shares = tuple(sorted(options.shares))
    missing = [(draw, share * best_rps) for draw in chosen.values() for share in shares]
    _add_points(base, [(draw, rps) for draw, rps in missing if rps not in curves[draw]], run_all, curves)
    needed = engines_needed(base, list(chosen.values()), best_rps, run_all) if options.count_engines else {}
    results = {
        policy: PolicyResult(
            max_rps=largest_of[draw],
            max_rps_draws=tuple(sorted(largest_of[other] for other in draws_of[policy])),
            at_80pct=curves[draw][0.8 * best_rps],
            engines_needed=needed.get(draw),
            curve=tuple(figures for _, figures in sorted(curves[draw].items())),
        )
        for policy, draw in chosen.items()
    }
    return Comparison(
        engines=base.engines,
        slo_ttft_s=slo_s,
        best_baseline=best,
        best_baseline_rps=best_rps,
        shares=shares,
        results=results,
    )


def find_largest(base: RunSpec, guess_rps: float, run_all: RunAll, curves: Curves) -> dict[PolicyDraw, float]:
    """Return each draw's highest request rate under the SLO. Adds the figures of all runs to ``curves``."""
    searches = {draw: _LoadSearch(guess_rps, base.settings.slo_ttft_s) for draw in curves}
    while unfinished := {draw: search for draw, search in searches.items() if not search.is_done}:
        _add_points(base, [(draw, search.next_rps) for draw, search in unfinished.items()], run_all, curves)
        for draw, search in unfinished.items():
            search.add(curves[draw][search.next_rps])
    return {draw: search.largest_rps for draw, search in searches.items()}


def engines_needed(
    base: RunSpec, draws: Sequence[PolicyDraw], rps: float, run_all: RunAll
) -> dict[PolicyDraw, int | None]:
    """Return the smallest number of engines with which each draw serves ``rps`` requests/s under the SLO.

    The number is None if the draw needs more than ``MAX_ENGINE_FACTOR`` times the engines of ``base``.
    """
    low = dict.fromkeys(draws, 0)
    high: dict[PolicyDraw, int] = dict.fromkeys(draws, MAX_ENGINE_FACTOR * base.engines + 1)
    tried = dict.fromkeys(draws, base.engines)
    while unfinished := [draw for draw in draws if high[draw] - low[draw] > 1]:
        specs = [msgspec.structs.replace(_spec(base, draw, rps), engines=tried[draw]) for draw in unfinished]
        for draw, figures in zip(unfinished, run_all(specs), strict=True):
            meets = figures.p95_ttft_s <= base.settings.slo_ttft_s
            (high if meets else low)[draw] = tried[draw]
            middle = (low[draw] + high[draw]) // 2
            # Most policies need about as many engines as ``base`` has, so try nearby numbers before the middle.
            near = ceil(tried[draw] * (0.8 if meets else 1.25))
            tried[draw] = near if low[draw] < near < high[draw] else middle
    return {draw: None if high[draw] > MAX_ENGINE_FACTOR * base.engines else high[draw] for draw in draws}


def changed_profiles(profile: Profile) -> dict[str, Profile]:
    """Return the profile and its variants by label. Each variant has one efficiency halved or doubled.

    An efficiency that is a fraction of a datasheet's figure stays at most 1. Raises ConfigError if the profile was not
    derived from a known datasheet.
    """
    if profile.origin != "derived":
        raise ConfigError(f"profile of {profile.model} on {profile.hardware} was measured; take a derived one")
    hardware = next((h for h in HARDWARE.values() if h.name == profile.hardware), None)
    if hardware is None:
        known = ", ".join(h.name for h in HARDWARE.values())
        raise ConfigError(f"profile of {profile.model}: there is no datasheet of {profile.hardware}, only of {known}")
    changed = {"nothing": profile}
    for name, efficiency in profile.efficiencies.items():
        for factor in EFFICIENCY_FACTORS:
            value = efficiency.value * factor
            value = min(value, 1.0) if efficiency.value < 1 and not name.endswith("_s") else value
            efficiencies = {**profile.efficiencies, name: msgspec.structs.replace(efficiency, value=value)}
            label = f"{name} x {factor:g}" + (" (all)" if value == 1.0 else "")
            changed[label] = derive_profile(profile.shape, hardware, efficiencies, profile.cost.lora, profile.model)
    return changed


class _LoadSearch:
    """A search for the highest request rate under the SLO. It finds a lower and an upper bound, then bisects."""

    def __init__(self, guess_rps: float, slo_ttft_s: float) -> None:
        self.next_rps = guess_rps
        self._guess_rps = guess_rps
        self._slo_s = slo_ttft_s
        self._low: RunFigures | None = None
        self._high: RunFigures | None = None
        self._tries = 0

    @property
    def is_done(self) -> bool:
        if self._low is None or self._high is None:
            # A short workload may never exceed the SLO, and a policy may never meet it.
            return self._tries >= MAX_TRIES or self.next_rps < self._guess_rps / MAX_GUESS_ERROR
        return self._high.rps <= self._low.rps * (1 + PRECISION)

    @property
    def largest_rps(self) -> float:
        """The highest request rate that met the SLO in a run; 0 if none did."""
        return self._low.rps if self._low is not None else 0.0

    def add(self, figures: RunFigures) -> None:
        """Add the figures of the run at ``next_rps`` and choose the next request rate."""
        self._tries += 1
        if figures.p95_ttft_s <= self._slo_s:
            self._low = figures
        else:
            self._high = figures
        factor = FIRST_FACTOR if self._tries < NEARBY_TRIES else LATER_FACTOR
        if self._low is None:
            self.next_rps = figures.rps / factor
        elif self._high is None:
            self.next_rps = figures.rps * factor
        else:
            self.next_rps = (self._low.rps * self._high.rps) ** 0.5


def _add_points(base: RunSpec, wanted: Sequence[tuple[PolicyDraw, float]], run_all: RunAll, curves: Curves) -> None:
    """Simulate each (draw, requests/s) pair in ``wanted`` and store its figures in ``curves``.

    Rates above 1.15 times a draw's lowest hopeless rate are not simulated. They get the figures of that rate.
    """
    hopeless = {
        draw: min((rps for rps, point in curve.items() if point.hopeless), default=inf)
        for draw, curve in curves.items()
    }
    runs = []
    for draw, rps in wanted:
        if rps > hopeless[draw] * 1.15:
            worst = curves[draw][hopeless[draw]]
            curves[draw][rps] = msgspec.structs.replace(worst, rps=rps)
        else:
            runs.append((draw, rps))
    figures = run_all([_spec(base, draw, rps) for draw, rps in runs])
    for (draw, rps), point in zip(runs, figures, strict=True):
        curves[draw][rps] = point


def _spec(base: RunSpec, draw: PolicyDraw, rps: float) -> RunSpec:
    settings = msgspec.structs.replace(base.settings, seed=draw.seed)
    return msgspec.structs.replace(base, policy=draw.policy, rps=rps, settings=settings)


# Estimates of capacity


def capacity_rps(workload: Workload, profile: Profile, engines: int) -> float:
    """Return a rough estimate of the requests per second that a cluster serves.

    The estimate assumes that all engines have equal work and always compute half-full batches of a single rank.
    """
    seconds = _engine_seconds(workload, profile, profile.engine.max_running / 2, slab_reads=0.5)
    return engines * len(workload.requests) / seconds if seconds else 1.0


def limit_rps(workload: Workload, profile: Profile, engines: int) -> float:
    """Return an upper bound of the requests per second that any policy can serve permanently.

    The bound assumes that engines are never idle and that batches are as full as ``max_running`` and KV memory allow.
    No token is padded to a higher rank, and reading slabs takes no time. Only a short run can meet the SLO above the
    bound, because many of its requests still wait or decode when arrivals end.
    """
    seconds = _engine_seconds(workload, profile, _fullest_batch(workload, profile), slab_reads=0.0)
    return engines * len(workload.requests) / seconds if seconds else float("inf")


def _engine_seconds(workload: Workload, profile: Profile, batch: float, slab_reads: float) -> float:
    """Return the engine seconds of all requests in batches of ``batch`` with ``slab_reads`` slabs per decoded token."""
    return sum(_request_s(r, workload.adapters[r.adapter], profile, batch, slab_reads) for r in workload.requests)


def _request_s(request: SimRequest, adapter: AdapterRef, profile: Profile, batch: float, slab_reads: float) -> float:
    cost, prompt, output = profile.cost, request.prompt_tokens, request.output_tokens
    prefill = StepShape(
        prefill_tokens=prompt,
        prefill_kv_tokens=prompt * prompt / 2,
        rank_tokens=prompt * adapter.rank,
        max_rank=adapter.rank,
    )
    decode = StepShape(
        decode_sequences=1,
        kv_tokens=prompt + output / 2,
        slab_bytes=adapter.slab_bytes * slab_reads,
        rank_tokens=adapter.rank,
        max_rank=adapter.rank,
    )
    token_s = cost.step_s(decode) - cost.step_base_s + cost.step_base_s / batch
    return cost.step_s(prefill) - cost.step_base_s + output * token_s


def _fullest_batch(workload: Workload, profile: Profile) -> float:
    """Return the mean number of decoding sequences while the batch or KV memory is always full."""
    engine = profile.engine
    tokens = sum(r.output_tokens for r in workload.requests)
    held = sum(r.output_tokens * (r.prompt_tokens + r.output_tokens / 2) for r in workload.requests)
    if not held:
        return engine.max_running
    return min(engine.max_running, engine.kv_blocks * engine.block_tokens * tokens / held)
