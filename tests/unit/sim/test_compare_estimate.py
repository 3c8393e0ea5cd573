"""Estimates of capacity: against figures worked out by hand and against runs."""

import msgspec
import pytest

from loraserve.cost.profile import Profile
from loraserve.sim.cluster import Simulation
from loraserve.sim.compare import capacity_rps, limit_rps
from loraserve.sim.outcome import SimSettings
from loraserve.sim.policies import policy_named
from loraserve.sim.workload import SimRequest, Workload, WorkloadShape, draw_workload, make_adapters

UNIT = 1 << 16


def one_kind(rank: int, requests: int = 10) -> Workload:
    """Return requests with 100 prompt and 20 output tokens for one adapter."""
    return Workload("w", make_adapters([rank], UNIT), tuple(SimRequest(i * 0.1, 0, 100, 20) for i in range(requests)))


def test_the_limit_is_the_time_of_the_requests_in_full_batches_at_their_own_rank(profile: Profile) -> None:
    prefill_s = 100 * (1e-4 + 8 * 1e-7)
    decode_s = 20 * (1e-4 + 8 * 3e-6 + 110 * 1e-7 + 0.01 / 32)
    assert limit_rps(one_kind(8), profile, 4) == pytest.approx(4 / (prefill_s + decode_s))


def test_little_kv_memory_makes_batches_smaller(profile: Profile) -> None:
    small = msgspec.structs.replace(profile, engine=msgspec.structs.replace(profile.engine, kv_blocks=110))
    longer_s = 1 / limit_rps(one_kind(8), small, 1) - 1 / limit_rps(one_kind(8), profile, 1)
    assert longer_s == pytest.approx(20 * 0.01 * (1 / 16 - 1 / 32)), "110 blocks hold 16 sequences of 110 tokens"


def test_a_larger_rank_lowers_the_limit(profile: Profile) -> None:
    assert limit_rps(one_kind(64), profile, 1) < limit_rps(one_kind(8), profile, 1)


def test_the_estimated_capacity_is_below_the_limit(profile: Profile) -> None:
    workload = draw_workload(WorkloadShape(requests=500, adapters=20), UNIT)
    assert capacity_rps(workload, profile, 4) < limit_rps(workload, profile, 4)


@pytest.mark.parametrize("policy", ["ours", "toppings"])
def test_no_policy_exceeds_the_limit(profile: Profile, policy: str) -> None:
    """The requests cannot all be computed sooner than the limit says."""
    workload = draw_workload(WorkloadShape(requests=800, adapters=12), UNIT).at(2000.0)
    settings = SimSettings(hopeless=float("inf"), reject_factor=1e9)
    outcome = Simulation(workload, policy_named(policy, 0), profile, 2, settings).run()
    ends = [r.end_s for r in outcome.requests if r.end_s is not None]
    began_s = min(r.arrival_s for r in outcome.requests)
    assert len(ends) == len(outcome.requests)
    assert len(workload.requests) / (max(ends) - began_s) < limit_rps(workload, profile, 2)
