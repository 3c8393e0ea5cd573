"""Policies against each other: the largest load each serves under the SLO, and how they do at the same loads. Pure.

``run`` simulates a batch of jobs; all of a batch are independent, so that they can run side by side.
"""

from collections.abc import Callable, Mapping, Sequence
from math import ceil, inf
from typing import NamedTuple

import msgspec

from loraserve.cost.derived import derive_profile
from loraserve.cost.hardware import HARDWARE
from loraserve.cost.profile import Profile
from loraserve.errors import ConfigError
from loraserve.sim.policies import policy_named
from loraserve.sim.runs import Job, Point

Run = Callable[[Sequence[Job]], list[Point]]

MOST_ENGINES = 3
"""Times as many as there are: policies that need more are not counted."""
PRECISION = 0.02
"""The largest load is found to within this share."""
FIRST_FACTOR = 1.3
LATER_FACTOR = 4.0
NEARBY_TRIES = 4
MOST_TRIES = 12
LEAST_OF_GUESS = 200.0
"""To find a load that is served, or one that is not: a short workload may never break the SLO."""
LOAD_SHARES = (0.3, 0.6, 0.8, 1.0, 1.2)
"""Of the best baseline's largest load: where all are compared."""
OURS = "ours"


class Entrant(NamedTuple):
    """A policy with the seed of its runs: one whose placement is drawn enters once for each draw."""

    policy: str
    seed: int


Curves = dict[Entrant, dict[float, Point]]
"""By load."""


class PolicyResult(msgspec.Struct, frozen=True, kw_only=True):
    """``curve`` in order of load, all points there are; ``at_80pct`` is at 80 % of the best baseline's max.

    Where the placement was drawn several times all is the median draw's; ``max_rps_draws`` are those of all, ascending.
    """

    policy: str
    max_rps: float
    max_rps_draws: tuple[float, ...]
    at_80pct: Point
    engines_needed: int | None
    curve: tuple[Point, ...]

    @property
    def p95_at_80pct_s(self) -> float:
        return self.at_80pct.p95_ttft_s


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """``engines_rps`` is the load that ``engines_needed`` is for."""

    engines: int
    slo_ttft_s: float
    best_baseline: str
    best_baseline_rps: float
    engines_rps: float
    shares: tuple[float, ...]
    results: dict[str, PolicyResult]

    def p95_at(self, policy: str, share: float) -> float:
        """At a share of the best baseline's largest load that was simulated for all."""
        rps = share * self.best_baseline_rps
        return next(p.p95_ttft_s for p in self.results[policy].curve if abs(p.rps - rps) < 1e-6 * rps)


def compare(
    base: Job,
    policies: Sequence[str],
    guess_rps: float,
    run: Run,
    shares: Sequence[float],
    count_engines: bool = True,
    draws: int = 1,
) -> Comparison:
    """All policies on the workload, engines and profile of ``base``. ``shares`` has 0.8 in it. Of a policy whose
    placement is drawn ``draws`` are searched, and the median one by its largest load is compared.

    Raises ConfigError where no baseline meets the SLO at any load: there is nothing to compare with.
    """
    entrants = {policy: _entrants(policy, base.settings.seed, draws) for policy in policies}
    curves: Curves = {entrant: {} for draws_of in entrants.values() for entrant in draws_of}
    largest_of = find_largest(base, guess_rps, run, curves)
    chosen = {policy: _median(draws_of, largest_of) for policy, draws_of in entrants.items()}
    largest = {policy: largest_of[entrant] for policy, entrant in chosen.items()}
    baselines = [p for p in policies if p != OURS] or list(policies)
    best = max(baselines, key=lambda p: largest[p])
    if not largest[best]:
        slo_s = base.settings.slo_ttft_s
        raise ConfigError(f"no baseline serves this workload within {slo_s} s; promise more (--slo-s)")
    wanted = [(entrant, share * largest[best]) for entrant in chosen.values() for share in sorted(shares)]
    _simulate(base, [(e, rps) for e, rps in wanted if rps not in curves[e]], run, curves)
    needed: dict[Entrant, int | None] = dict.fromkeys(chosen.values())
    if count_engines:
        needed = engines_needed(base, list(chosen.values()), largest[best], run)
    return Comparison(
        engines=base.engines,
        slo_ttft_s=base.settings.slo_ttft_s,
        best_baseline=best,
        best_baseline_rps=largest[best],
        engines_rps=largest[best],
        shares=tuple(sorted(shares)),
        results={
            policy: PolicyResult(
                policy=policy,
                max_rps=largest[policy],
                max_rps_draws=tuple(sorted(largest_of[draw] for draw in entrants[policy])),
                at_80pct=curves[entrant][0.8 * largest[best]],
                engines_needed=needed[entrant],
                curve=tuple(point for _, point in sorted(curves[entrant].items())),
            )
            for policy, entrant in chosen.items()
        },
    )


def find_largest(base: Job, guess_rps: float, run: Run, curves: Curves) -> dict[Entrant, float]:
    """The largest load under the SLO of each entrant: a bracket first, then halving it, all entrants at once."""
    searches = {entrant: _Search(guess_rps, base.settings.slo_ttft_s) for entrant in curves}
    while open_ := {e: s for e, s in searches.items() if not s.done}:
        _simulate(base, [(e, s.next_rps) for e, s in open_.items()], run, curves)
        for entrant, search in open_.items():
            search.saw(curves[entrant][search.next_rps])
    return {entrant: search.largest_rps for entrant, search in searches.items()}


def engines_needed(base: Job, entrants: Sequence[Entrant], rps: float, run: Run) -> dict[Entrant, int | None]:
    """The fewest engines that serve this load under the SLO; None where three times as many as now do not."""
    low = dict.fromkeys(entrants, 0)
    high: dict[Entrant, int] = dict.fromkeys(entrants, MOST_ENGINES * base.engines + 1)
    tried = dict.fromkeys(entrants, base.engines)
    while open_ := [e for e in entrants if high[e] - low[e] > 1]:
        jobs = [msgspec.structs.replace(_job(base, e, rps), engines=tried[e]) for e in open_]
        for entrant, point in zip(open_, run(jobs), strict=True):
            meets = point.p95_ttft_s <= base.settings.slo_ttft_s
            (high if meets else low)[entrant] = tried[entrant]
            step = (low[entrant] + high[entrant]) // 2
            # Most policies need about as many as there are: look nearby before halving the whole.
            near = ceil(tried[entrant] * (0.8 if meets else 1.25))
            tried[entrant] = near if low[entrant] < near < high[entrant] else step
    return {e: None if high[e] > MOST_ENGINES * base.engines else high[e] for e in entrants}


def _entrants(policy: str, seed: int, draws: int) -> list[Entrant]:
    return [Entrant(policy, seed + draw) for draw in range(draws if policy_named(policy).drawn else 1)]


def _median(entrants: Sequence[Entrant], largest: Mapping[Entrant, float]) -> Entrant:
    """By largest load; of an even number the lower of the two in the middle."""
    return sorted(entrants, key=lambda entrant: largest[entrant])[(len(entrants) - 1) // 2]


class _Search:
    """A bracket of the largest load, narrowed one simulation at a time."""

    def __init__(self, guess_rps: float, slo_ttft_s: float) -> None:
        self.next_rps = guess_rps
        self._guess_rps = guess_rps
        self._slo_s = slo_ttft_s
        self._low: Point | None = None
        self._high: Point | None = None
        self._tries = 0

    @property
    def done(self) -> bool:
        if self._low is None or self._high is None:
            return self._tries >= MOST_TRIES or self._hopelessly_low(self.next_rps)
        return self._high.rps <= self._low.rps * (1 + PRECISION)

    @property
    def _factor(self) -> float:
        return FIRST_FACTOR if self._tries < NEARBY_TRIES else LATER_FACTOR

    def _hopelessly_low(self, rps: float) -> bool:
        return rps < self._guess_rps / LEAST_OF_GUESS

    def saw(self, point: Point) -> None:
        self._tries += 1
        if point.p95_ttft_s <= self._slo_s:
            self._low = point
        else:
            self._high = point
        if self._low is None:
            self.next_rps = point.rps / self._factor
        elif self._high is None:
            self.next_rps = point.rps * self._factor
        else:
            self.next_rps = (self._low.rps * self._high.rps) ** 0.5

    @property
    def largest_rps(self) -> float:
        """The largest load that was simulated and met the SLO; 0 where none did."""
        return self._low.rps if self._low is not None else 0.0


def _simulate(base: Job, wanted: Sequence[tuple[Entrant, float]], run: Run, curves: Curves) -> None:
    """Points into the curves. Above a load that was hopeless all are: they are not simulated."""
    hopeless = {e: min((rps for rps, q in c.items() if q.hopeless), default=inf) for e, c in curves.items()}
    asked = []
    for entrant, rps in wanted:
        if rps > hopeless[entrant] * 1.15:
            worst = curves[entrant][hopeless[entrant]]
            curves[entrant][rps] = msgspec.structs.replace(worst, rps=rps)
        else:
            asked.append((entrant, rps))
    points = run([_job(base, entrant, rps) for entrant, rps in asked])
    for (entrant, rps), point in zip(asked, points, strict=True):
        curves[entrant][rps] = point


def _job(base: Job, entrant: Entrant, rps: float) -> Job:
    settings = msgspec.structs.replace(base.settings, seed=entrant.seed)
    return msgspec.structs.replace(base, policy=entrant.policy, rps=rps, settings=settings)


# MERGED: loraserve.sim.compare
# """A derived profile with one efficiency changed at a time. Pure."""


FACTORS = (0.5, 2.0)


def changed_profiles(profile: Profile) -> dict[str, Profile]:
    """The profile itself, then each of its efficiencies halved and doubled; what would be more than all is all.

    Raises ConfigError where the profile was not derived: what was measured has no efficiencies to change.
    """
    if profile.origin != "derived":
        raise ConfigError(f"profile of {profile.model} on {profile.hardware} was measured; take a derived one")
    hardware = next((h for h in HARDWARE.values() if h.name == profile.hardware), None)
    if hardware is None:
        known = ", ".join(h.name for h in HARDWARE.values())
        raise ConfigError(f"profile of {profile.model}: there is no datasheet of {profile.hardware}, only of {known}")
    changed = {"nothing": profile}
    for name, efficiency in profile.efficiencies.items():
        for factor in FACTORS:
            value = efficiency.value * factor
            # A share of a datasheet's figure ends at all of it; rates and times do not.
            value = min(value, 1.0) if efficiency.value < 1 and not name.endswith("_s") else value
            efficiencies = {**profile.efficiencies, name: msgspec.structs.replace(efficiency, value=value)}
            label = f"{name} x {factor:g}" + (" (all)" if value == 1.0 else "")
            changed[label] = derive_profile(profile.shape, hardware, efficiencies, profile.cost.lora, profile.model)
    return changed
