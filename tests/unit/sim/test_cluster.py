"""A simulated cluster under every policy."""

from math import inf

import msgspec
import pytest

from loraserve.cost.profile import Profile
from loraserve.sim.cluster import Simulation
from loraserve.sim.outcome import Outcome, SimSettings
from loraserve.sim.policies import POLICY_NAMES, policy_named
from loraserve.sim.workload import Workload, WorkloadShape, draw_workload

ENGINES = 3
SETTINGS = SimSettings(plan_interval_s=5.0, window_s=10.0)


def workload(profile: Profile, rps: float, requests: int = 300) -> Workload:
    return draw_workload(WorkloadShape(requests=requests, adapters=20), profile.engine.slab_bytes_per_rank).at(rps)


def simulate(profile: Profile, policy: str, rps: float = 10.0, requests: int = 300) -> Outcome:
    return Simulation(workload(profile, rps, requests), policy_named(policy), profile, ENGINES, SETTINGS).run()


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_every_request_is_served_and_every_engine_ends_idle(policy: str, profile: Profile) -> None:
    simulation = Simulation(workload(profile, 10.0), policy_named(policy), profile, ENGINES, SETTINGS)
    outcome = simulation.run()
    assert len(outcome.requests) == 240, "the first fifth is left out"
    for request in outcome.requests:
        assert request.arrival_s < (request.first_token_s or inf) <= (request.end_s or inf) < inf
    assert outcome.p95_ttft_s < 10
    for engine in simulation.engines.values():
        engine.scheduler.validate()
        assert engine.scheduler.is_idle


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_a_run_is_reproducible(policy: str, profile: Profile) -> None:
    first, second = (simulate(profile, policy) for _ in range(2))
    assert [r.first_token_s for r in first.requests] == [r.first_token_s for r in second.requests]


def test_requests_that_arrive_all_at_once_have_no_goodput(profile: Profile) -> None:
    drawn = workload(profile, 10.0, requests=40)
    burst = [msgspec.structs.replace(r, time_s=1.0 if i else 0.0) for i, r in enumerate(drawn.requests)]
    at_once = msgspec.structs.replace(drawn, requests=tuple(burst))
    outcome = Simulation(at_once, policy_named("ours"), profile, ENGINES, SETTINGS).run()
    assert outcome.goodput_rps == 0.0
    assert outcome.p95_ttft_s < inf


def test_toppings_holds_every_adapter_and_others_do_not(profile: Profile) -> None:
    assert simulate(profile, "toppings").bytes_share == pytest.approx(1.0)
    assert simulate(profile, "slora-random").bytes_share == pytest.approx(1 / ENGINES, rel=0.05)
    assert simulate(profile, "ours").bytes_share < 0.7


def test_p95_never_falls_with_load(profile: Profile) -> None:
    times = [simulate(profile, "toppings", rps).p95_ttft_s for rps in (5.0, 20.0, 80.0)]
    assert times == sorted(times)


def test_a_hopeless_run_is_stopped(profile: Profile) -> None:
    outcome = simulate(profile, "slora-random", rps=300.0, requests=1500)
    assert outcome.hopeless
    assert outcome.p95_ttft_s == inf
    assert any(request.end_s is None for request in outcome.requests)


def test_rejected_requests_have_no_first_token(profile: Profile) -> None:
    settings = SimSettings(slo_ttft_s=0.05, reject_factor=1.0, hopeless=1e9)
    outcome = Simulation(workload(profile, 200.0), policy_named("ours"), profile, ENGINES, settings).run()
    rejected = [request for request in outcome.requests if request.rejected]
    assert rejected
    assert all(request.ttft_s == inf for request in rejected)
    assert outcome.rejected == len(rejected)


def test_requests_for_an_adapter_that_does_not_fit_are_rejected_and_not_lost(profile: Profile) -> None:
    tight = draw_workload(WorkloadShape(requests=60, adapters=20), slab_bytes_per_rank=4 << 20).at(10.0)
    settings = SimSettings(hopeless=inf)
    outcome = Simulation(tight, policy_named("slora-random"), profile, ENGINES, settings).run()
    large = {i for i, adapter in enumerate(tight.adapters) if adapter.rank == 128}
    assert {r.adapter for r in outcome.requests if r.rejected} <= large
    assert all(r.rejected or r.end_s is not None for r in outcome.requests)
    assert outcome.rejected > 0
