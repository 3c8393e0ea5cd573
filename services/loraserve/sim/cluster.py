"""A simulated cluster: arrivals, the router's view, the monitor's windows, plans and their roll-out. Pure.

Every decision is the live code's. Messages take no time, and all engines report at the same moments.
"""

from collections.abc import Callable
from math import isinf
from random import Random

import msgspec

from loraserve.cost import CostLearner, extent_bytes
from loraserve.cost.profile import Profile
from loraserve.engine.schedule.events import SchedulerLimits
from loraserve.messages import (
    AdapterDemand,
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
from loraserve.planner.placement.problem import PlanSettings
from loraserve.router.context import PlannedCopies, RoutingContext, Slo
from loraserve.router.view import ClusterView
from loraserve.sim.engine import SimEngine, Timeline, Watcher
from loraserve.sim.outcome import Interval, Outcome, RequestOutcome, SimSettings
from loraserve.sim.planner import SimPlanner
from loraserve.sim.policies import Policy
from loraserve.sim.workload import SimRequest, Workload

TELL_EVERY = 500
"""Requests between two words of progress."""


class Simulation(Watcher):
    """One policy serves one workload."""

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
        limits = _limits(profile, workload, policy.everywhere)
        self.engines = {
            name: SimEngine(name, limits, profile.cost, self._timeline, self, free_loads=policy.everywhere)
            for name in (f"engine-{index}" for index in range(engines))
        }
        self._planner = SimPlanner(
            policy,
            self._adapters,
            self.engines,
            self._timeline,
            PlanSettings(slo_ttft_s=self._settings.slo_ttft_s, interval_s=self._settings.plan_interval_s),
            self._settings.prepare_timeout_s,
            self._publish,
        )
        self._view = ClusterView(prefix_cache=False)
        self._loads: list[EngineLoad] = []
        self._demand = DemandWindow(self._settings.window_s, self._settings.plan_interval_s)
        self._learner = CostLearner(profile.cost)
        self._planned: PlannedCopies | None = None
        self._pictures = 0
        self._requests: dict[str, RequestOutcome] = {}
        self._live = 0
        self._intervals: list[Interval] = []
        self._whys: dict[str, int] = {}
        self._hopeless = False
        self._began_s = 0.0

    def run(self, progress: Callable[[float], None] = lambda share: None) -> Outcome:
        """The whole workload; ``progress`` is told now and then what share of it has arrived."""
        self._report(0.0)
        self._replan(0.0)
        self._give_up(0.0)
        requests = self._workload.requests
        told = 0
        while not self._hopeless and (len(self._requests) < len(requests) or self._live):
            if not self._timeline.next():
                break
            if len(self._requests) >= told + TELL_EVERY:
                told = len(self._requests)
                progress(told / len(requests))
        progress(1.0)
        return self._outcome()

    def first_token(self, request_id: str, now: float) -> None:
        self._requests[request_id].first_token_s = now

    def finished(self, request_id: str, now: float) -> None:
        self._requests[request_id].end_s = now
        self._live -= 1

    def rejected(self, request_id: str, now: float) -> None:
        self._requests[request_id].rejected = True
        self._live -= 1

    def prepared(self, engine: str, epoch: int, failed: dict[str, str], now: float) -> None:
        self._planner.prepared(engine, epoch, failed, now)

    def _begin(self, now: float) -> None:
        """The cluster is warm: requests begin to arrive, so long after now as the workload says."""
        self._began_s = now
        if self._workload.requests:
            self._timeline.at(now + self._workload.requests[0].time_s, lambda at: self._arrive(0, at))

    def _arrive(self, index: int, now: float) -> None:
        request = self._workload.requests[index]
        request_id = f"r{index}"
        if index + 1 < len(self._workload.requests):
            next_s = self._began_s + self._workload.requests[index + 1].time_s
            self._timeline.at(next_s, lambda later: self._arrive(index + 1, later))
        outcome = self._requests[request_id] = RequestOutcome(index, request.adapter, now)
        self._live += 1
        self._view.expire_pending(now)
        route, output_tokens = self._route_message(request_id, index, request)
        choice = self._policy.route(
            RoutingContext(route, self._view, self._planned, self._learner.cost, self._slo, self._rng)
        )
        if isinstance(choice, Rejected):
            self.rejected(request_id, now)
            return
        chosen = choice.first
        self._whys[chosen.why] = self._whys.get(chosen.why, 0) + 1
        outcome.engine = chosen.engine
        self._view.record_sent(chosen.engine, route, now)
        admit = Admit(
            request_id=request_id,
            gateway="gateway",
            prompt_tokens=route.prompt_tokens,
            sampling=msgspec.structs.replace(route.sampling, max_tokens=output_tokens),
            adapter=route.adapter,
        )
        self.engines[chosen.engine].admit(admit, now)
        self._view.record_admitted(chosen.engine, request_id, "simulated", now)

    def _route_message(self, request_id: str, index: int, request: SimRequest) -> tuple[Route, int]:
        """What the router sees, and the output tokens, which it does not: who asks rarely knows them beforehand.

        Prompts begin differently: a trace says nothing of shared prefixes, so there are none.
        """
        longest = self._profile.engine.max_model_tokens
        prompt = max(1, min(request.prompt_tokens, longest - 2))
        output = max(1, min(request.output_tokens, longest - prompt - 1))
        route = Route(
            request_id=request_id,
            gateway="gateway",
            prompt_tokens=(index + 1,) + (0,) * (prompt - 1),
            sampling=SamplingParams(max_tokens=longest, temperature=0.0, ignore_eos=True),
            adapter=self._workload.adapters[request.adapter],
        )
        return route, output

    def _report(self, now: float) -> None:
        """Every engine reports; the monitor's picture reaches the router."""
        self._timeline.at(now + self._settings.report_interval_s, self._report)
        loads = [engine.report(now) for engine in self.engines.values()]
        for load in loads:
            self._demand.report(load, now)
        self._learner.learn(loads, self.engines)
        self._pictures += 1
        picture = ClusterLoad(
            incarnation="simulated",
            sequence=self._pictures,
            engines=tuple(EngineSeen(load=load, age_s=0.0, alive=True) for load in loads),
            demand=self._seen(now),
        )
        self._view.update(picture, now)
        self._loads = loads
        self._planner.see(loads, now)

    def _seen(self, now: float) -> tuple[AdapterDemand, ...]:
        return self._demand.demand(now, self._adapters)

    def _replan(self, now: float) -> None:
        self._timeline.at(now + self._settings.plan_interval_s, self._replan)
        self._note_interval(now)
        self._planner.plan(self._seen(now), self._loads, self._learner.cost, now)

    def _publish(self, plan: Plan, now: float) -> None:
        if self._planned is None:
            self._begin(now)
        self._planned = PlannedCopies(plan)

    def _note_interval(self, now: float) -> None:
        held = [engine.held_bytes() for engine in self.engines.values()]
        moves = self._planner.take_moves()
        self._intervals.append(
            Interval(
                time_s=now,
                moves=moves,
                held_bytes=tuple(h for h, _ in held),
                needed_bytes=tuple(n for _, n in held),
                rank_tokens=tuple(dict(engine.rank_tokens) for engine in self.engines.values()),
                adapters=tuple(
                    sum(1 for _ in engine.scheduler.residency.pool.entries()) for engine in self.engines.values()
                ),
            )
        )
        for engine in self.engines.values():
            engine.rank_tokens.clear()

    def _give_up(self, now: float) -> None:
        """Where so many have waited so long that the P95 cannot come back to what is of interest."""
        if isinf(self._settings.hopeless):
            return
        self._timeline.at(now + self._settings.slo_ttft_s, self._give_up)
        limit_s = self._settings.hopeless * self._slo.ttft_s
        first = int(len(self._workload.requests) * self._settings.warmup)
        late = sum(
            r.rejected or (r.first_token_s or now) - r.arrival_s > limit_s
            for r in self._requests.values()
            if r.index >= first
        )
        self._hopeless = late > 0.05 * (len(self._workload.requests) - first)

    def _outcome(self) -> Outcome:
        first = int(len(self._workload.requests) * self._settings.warmup)
        self._note_interval(self._timeline.now_s)
        return Outcome(
            policy=self._policy.name,
            engines=len(self.engines),
            workload=self._workload.name,
            rps=self._workload.rps,
            slo_ttft_s=self._slo.ttft_s,
            hopeless=self._hopeless,
            requests=tuple(r for r in self._requests.values() if r.index >= first),
            intervals=tuple(self._intervals),
            all_bytes=sum(adapter.slab_bytes for adapter in self._workload.adapters),
            busy_share=sum(e.busy_s for e in self.engines.values()) / len(self.engines) / (self._timeline.now_s or 1),
            whys=dict(self._whys),
        )


def _limits(profile: Profile, workload: Workload, everywhere: bool) -> SchedulerLimits:
    engine = profile.engine
    # Whoever is given every adapter for nothing is given the memory as well.
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
