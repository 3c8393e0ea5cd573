"""A simulated cluster: arrivals, the router's view, the monitor's demand windows, and plans.

The production code makes every decision. Messages take no time, and all engines report at the same times.
"""

from collections import Counter
from collections.abc import Callable
from math import isinf
from random import Random

import msgspec

from loraserve.cost import CostLearner, extent_bytes
from loraserve.cost.profile import Profile
from loraserve.engine.schedule.events import RequestArrived, SchedulerLimits
from loraserve.messages import (
    Admit,
    ClusterLoad,
    EngineLoad,
    EngineSeen,
    Plan,
    Rejected,
    Route,
    SamplingParams,
)
from loraserve.monitor.demand import DemandWindow
from loraserve.router.context import PlannedCopies, RoutingContext, Slo
from loraserve.router.view import ClusterView
from loraserve.sim.engine import INCARNATION, EngineListener, SimEngine, Timeline
from loraserve.sim.outcome import WARMUP_SHARE, Interval, Outcome, RequestOutcome, SimSettings
from loraserve.sim.planner import SimPlanner
from loraserve.sim.policies import Policy
from loraserve.sim.workload import SimRequest, Workload

PROGRESS_REQUESTS = 500
"""Number of arrivals between two calls of the progress function."""


class Simulation(EngineListener):
    """A simulation of one policy on one workload. ``run`` may be called only once."""

    def __init__(
        self, workload: Workload, policy: Policy, profile: Profile, engines: int, settings: SimSettings | None = None
    ) -> None:
        self._settings = settings or SimSettings()
        self._workload = workload
        self._policy = policy
        self._profile = profile
        self._timeline = Timeline()
        self._rng = Random(self._settings.seed)
        self._slo = Slo(self._settings.slo_ttft_s, self._settings.reject_factor)
        self._adapters = {adapter.version: adapter for adapter in workload.adapters}
        limits = _scheduler_limits(profile, workload, policy.everywhere)
        cost = profile.cost
        if policy.everywhere:
            cost = msgspec.structs.replace(cost, load_base_s=0.0, load_byte_s=0.0)
        names = [f"engine-{index}" for index in range(engines)]
        self.engines = {name: SimEngine(name, limits, cost, self._timeline, self) for name in names}
        self._planner = SimPlanner(
            policy, self._adapters, self.engines, self._timeline, self._settings, self._publish_plan
        )
        self._view = ClusterView(prefix_cache=False)
        self._loads: list[EngineLoad] = []
        self._demand = DemandWindow(self._settings.window_s, self._settings.plan_interval_s)
        self._learner = CostLearner(profile.cost)
        self._plan: PlannedCopies | None = None
        self._snapshots = 0
        self._warmup_requests = int(len(workload.requests) * WARMUP_SHARE)
        self._requests: dict[str, RequestOutcome] = {}
        self._unfinished = 0
        self._intervals: list[Interval] = []
        self._whys = Counter[str]()
        self._is_hopeless = False
        self._arrivals_start_s = 0.0

    def run(self, progress: Callable[[float], None] = lambda share: None) -> Outcome:
        """Simulate the whole workload. ``progress`` is called with the fraction of requests that have arrived."""
        self._report(0.0)
        self._replan(0.0)
        self._check_hopeless(0.0)
        count = len(self._workload.requests)
        shown = 0
        while not self._is_hopeless and (len(self._requests) < count or self._unfinished):
            if not self._timeline.run_next():
                break
            if len(self._requests) >= shown + PROGRESS_REQUESTS:
                shown = len(self._requests)
                progress(shown / count)
        progress(1.0)
        return self._outcome()

    # Output of the engines

    def on_first_token(self, request_id: str, now: float) -> None:
        self._requests[request_id].first_token_s = now

    def on_finished(self, request_id: str, now: float) -> None:
        self._requests[request_id].end_s = now
        self._unfinished -= 1

    def on_rejected(self, request_id: str, now: float) -> None:
        self._requests[request_id].rejected = True
        self._unfinished -= 1

    def on_prepared(self, engine: str, epoch: int, failed: dict[str, str], now: float) -> None:
        self._planner.record_prepared(engine, epoch, failed, now)

    # Arrivals

    def _schedule_arrival(self, index: int) -> None:
        if index < len(self._workload.requests):
            time_s = self._arrivals_start_s + self._workload.requests[index].time_s
            self._timeline.schedule(time_s, lambda now: self._arrive(index, now))

    def _arrive(self, index: int, now: float) -> None:
        request = self._workload.requests[index]
        request_id = f"r{index}"
        self._schedule_arrival(index + 1)
        outcome = self._requests[request_id] = RequestOutcome(index, request.adapter, now)
        self._unfinished += 1
        self._view.expire_pending(now)
        route, output_tokens = self._route_message(request_id, index, request)
        context = RoutingContext(route, self._view, self._plan, self._learner.cost, self._slo, self._rng)
        choice = self._policy.route(context)
        if isinstance(choice, Rejected):
            self.on_rejected(request_id, now)
            return
        first = choice.first
        self._whys[first.why] += 1
        outcome.engine = first.engine
        self._view.record_sent(first.engine, route, now)
        admit = Admit(
            request_id=request_id,
            gateway="gateway",
            prompt_tokens=route.prompt_tokens,
            sampling=msgspec.structs.replace(route.sampling, max_tokens=output_tokens),
            adapter=route.adapter,
        )
        self.engines[first.engine].deliver(RequestArrived(admit), now)
        self._view.record_admitted(first.engine, request_id, INCARNATION, now)

    def _route_message(self, request_id: str, index: int, request: SimRequest) -> tuple[Route, int]:
        """Return a request's message to the router, and its number of output tokens, which the router does not know."""
        max_tokens = self._profile.engine.max_model_tokens
        prompt = max(1, min(request.prompt_tokens, max_tokens - 2))
        output = max(1, min(request.output_tokens, max_tokens - prompt - 1))
        route = Route(
            request_id=request_id,
            gateway="gateway",
            # Each prompt starts with a different token, because traces do not describe shared prefixes.
            prompt_tokens=(index + 1,) + (0,) * (prompt - 1),
            sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
            adapter=self._workload.adapters[request.adapter],
        )
        return route, output

    # Reports and plans

    def _report(self, now: float) -> None:
        """Collect the reports of all engines and pass them to the router's view and the planner."""
        self._timeline.schedule(now + self._settings.report_interval_s, self._report)
        loads = []
        for engine in self.engines.values():
            load, statistics = engine.report(now)
            loads.append(load)
            self._demand.report(statistics, now)
        self._learner.learn(loads, self.engines)
        self._snapshots += 1
        snapshot = ClusterLoad(
            incarnation=INCARNATION,
            sequence=self._snapshots,
            engines=tuple(
                EngineSeen(load=load, capabilities=self.engines[load.engine].capabilities, age_s=0.0, alive=True)
                for load in loads
            ),
            demand=self._demand.demand(now, self._adapters),
        )
        self._view.update(snapshot, now)
        self._loads = loads
        self._planner.update(loads, now)

    def _replan(self, now: float) -> None:
        self._timeline.schedule(now + self._settings.plan_interval_s, self._replan)
        self._end_interval(now)
        self._planner.plan(self._demand.demand(now, self._adapters), self._loads, self._learner.cost, now)

    def _publish_plan(self, plan: Plan, now: float) -> None:
        if self._plan is None:
            # Requests arrive only now, after the engines have loaded the adapters of the first plan.
            self._arrivals_start_s = now
            self._schedule_arrival(0)
        self._plan = PlannedCopies(plan)

    # Figures

    def _end_interval(self, now: float) -> None:
        engines = self.engines.values()
        pools = [list(engine.scheduler.residency.pool.entries()) for engine in engines]
        self._intervals.append(
            Interval(
                time_s=now,
                moves=self._planner.take_moves(),
                held_bytes=tuple(sum(e.adapter.slab_bytes for e in pool) for pool in pools),
                needed_bytes=tuple(sum(e.adapter.slab_bytes for e in pool if not e.evictable) for pool in pools),
                rank_tokens=tuple(engine.take_rank_tokens() for engine in engines),
                adapters=tuple(len(pool) for pool in pools),
            )
        )

    def _check_hopeless(self, now: float) -> None:
        """Stop the run if its P95 TTFT is already certain to exceed ``hopeless`` times the SLO."""
        if isinf(self._settings.hopeless):
            return
        self._timeline.schedule(now + self._settings.slo_ttft_s, self._check_hopeless)
        limit_s = self._settings.hopeless * self._slo.ttft_s
        late = sum(
            r.rejected or (r.first_token_s or now) - r.arrival_s > limit_s
            for r in self._requests.values()
            if r.index >= self._warmup_requests
        )
        self._is_hopeless = late > 0.05 * (len(self._workload.requests) - self._warmup_requests)

    def _outcome(self) -> Outcome:
        self._end_interval(self._timeline.now_s)
        return Outcome(
            policy=self._policy.name,
            engines=len(self.engines),
            workload=self._workload.name,
            rps=self._workload.rps,
            slo_ttft_s=self._slo.ttft_s,
            hopeless=self._is_hopeless,
            requests=tuple(r for r in self._requests.values() if r.index >= self._warmup_requests),
            intervals=tuple(self._intervals),
            all_bytes=sum(adapter.slab_bytes for adapter in self._workload.adapters),
            busy_share=sum(e.busy_s for e in self.engines.values()) / len(self.engines) / (self._timeline.now_s or 1),
            whys=dict(self._whys),
        )


def _scheduler_limits(profile: Profile, workload: Workload, everywhere: bool) -> SchedulerLimits:
    engine = profile.engine
    # With ``everywhere``, the pool holds all adapters and takes no KV memory.
    all_bytes = sum(extent_bytes(adapter.slab_bytes) for adapter in workload.adapters)
    return SchedulerLimits(
        kv_blocks=engine.kv_blocks,
        block_tokens=engine.block_tokens,
        pool_bytes=all_bytes if everywhere else engine.pool_bytes,
        max_adapters=len(workload.adapters) + 1,
        max_rank=max((adapter.rank for adapter in workload.adapters), default=1),
        max_running=engine.max_running,
        max_waiting=1_000_000,
        max_step_tokens=engine.max_step_tokens,
        max_model_tokens=engine.max_model_tokens,
        eos_token_ids=frozenset(),
        prefix_cache=False,
        max_loads=len(workload.adapters) if everywhere else 2,
    )
