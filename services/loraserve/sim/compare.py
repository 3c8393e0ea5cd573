"""Policies against each other: the largest load each serves under the SLO, and how they do at the same loads. Pure.

``run`` simulates a batch of jobs; all of a batch are independent, so that they can run side by side.
"""

from collections.abc import Callable, Sequence
from math import ceil, inf

import msgspec

from loraserve.errors import ConfigError
from loraserve.sim.points import Job, Point

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


class PolicyResult(msgspec.Struct, frozen=True, kw_only=True):
    """``curve`` in order of load, all points there are; ``at_80pct`` is at 80 % of the best baseline's max."""

    policy: str
    max_rps: float
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
) -> Comparison:
    """All policies on the workload, engines and profile of ``base``. ``shares`` has 0.8 in it.

    Raises ConfigError where no baseline meets the SLO at any load: there is nothing to compare with.
    """
    curves: dict[str, dict[float, Point]] = {policy: {} for policy in policies}
    largest = find_largest(base, policies, guess_rps, run, curves)
    baselines = [p for p in policies if p != OURS] or list(policies)
    best = max(baselines, key=lambda p: largest[p])
    if not largest[best]:
        slo_s = base.settings.slo_ttft_s
        raise ConfigError(f"no baseline serves this workload within {slo_s} s; promise more (--slo-s)")
    wanted = [(policy, share * largest[best]) for policy in policies for share in sorted(shares)]
    _simulate(base, [(p, rps) for p, rps in wanted if rps not in curves[p]], run, curves)
    needed: dict[str, int | None] = dict.fromkeys(policies)
    if count_engines:
        needed = engines_needed(base, policies, largest[best], run)
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
                at_80pct=curves[policy][0.8 * largest[best]],
                engines_needed=needed[policy],
                curve=tuple(point for _, point in sorted(curves[policy].items())),
            )
            for policy in policies
        },
    )


def find_largest(
    base: Job, policies: Sequence[str], guess_rps: float, run: Run, curves: dict[str, dict[float, Point]]
) -> dict[str, float]:
    """The largest load under the SLO of each policy: a bracket first, then halving it, all policies at once."""
    searches = {policy: _Search(guess_rps, base.settings.slo_ttft_s) for policy in policies}
    while open_ := {p: s for p, s in searches.items() if not s.done}:
        _simulate(base, [(p, s.next_rps) for p, s in open_.items()], run, curves)
        for policy, search in open_.items():
            search.saw(curves[policy][search.next_rps])
    return {policy: search.largest_rps for policy, search in searches.items()}


def engines_needed(base: Job, policies: Sequence[str], rps: float, run: Run) -> dict[str, int | None]:
    """The fewest engines that serve this load under the SLO; None where three times as many as now do not."""
    low = dict.fromkeys(policies, 0)
    high: dict[str, int] = dict.fromkeys(policies, MOST_ENGINES * base.engines + 1)
    tried = dict.fromkeys(policies, base.engines)
    while open_ := [p for p in policies if high[p] - low[p] > 1]:
        jobs = [msgspec.structs.replace(base, policy=p, engines=tried[p], rps=rps) for p in open_]
        for policy, point in zip(open_, run(jobs), strict=True):
            meets = point.p95_ttft_s <= base.settings.slo_ttft_s
            (high if meets else low)[policy] = tried[policy]
            step = (low[policy] + high[policy]) // 2
            # Most policies need about as many as there are: look nearby before halving the whole.
            near = ceil(tried[policy] * (0.8 if meets else 1.25))
            tried[policy] = near if low[policy] < near < high[policy] else step
    return {p: None if high[p] > MOST_ENGINES * base.engines else high[p] for p in policies}


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


def _simulate(base: Job, wanted: Sequence[tuple[str, float]], run: Run, curves: dict[str, dict[float, Point]]) -> None:
    """Points into the curves. Above a load that was hopeless all are: they are not simulated."""
    hopeless = {p: min((rps for rps, q in c.items() if q.hopeless), default=inf) for p, c in curves.items()}
    jobs = []
    for policy, rps in wanted:
        if rps > hopeless[policy] * 1.15:
            worst = curves[policy][hopeless[policy]]
            curves[policy][rps] = msgspec.structs.replace(worst, rps=rps)
        else:
            jobs.append(msgspec.structs.replace(base, policy=policy, rps=rps))
    for job, point in zip(jobs, run(jobs), strict=True):
        curves[job.policy][job.rps] = point
