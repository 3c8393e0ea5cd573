"""Predicts the result of a live run with the simulator: workload, cluster and policy are the ones of the run."""

from math import isfinite
from typing import NamedTuple

from live.cluster import PLAN_INTERVAL_S, REJECT_FACTOR, WINDOW_S
from live.scene import ENGINES
from loraserve.cost.profile import Profile
from loraserve.sim.cluster import Simulation
from loraserve.sim.outcome import SimSettings
from loraserve.sim.policies import policy_named
from loraserve.sim.workload import Workload


class Predicted(NamedTuple):
    """TTFT in seconds, or None if the simulated cluster is overloaded."""

    p50_s: float | None
    p95_s: float | None
    goodput_rps: float
    busy: float
    """Mean share of time in which an engine computes."""


def predict(workload: Workload, policy: str, profile: Profile, slo_s: float) -> Predicted:
    """Simulate the workload. The simulator has no HTTP, gateway or bus, so its TTFT is the engine's part."""
    settings = SimSettings(
        slo_ttft_s=slo_s,
        reject_factor=REJECT_FACTOR,
        plan_interval_s=PLAN_INTERVAL_S,
        window_s=WINDOW_S,
        # Runs far above the SLO are compared as well.
        hopeless=1e6,
    )
    outcome = Simulation(workload, policy_named(policy), profile, ENGINES, settings).run()
    p50_s, p95_s = (value if isfinite(value) else None for value in (outcome.p50_ttft_s, outcome.p95_ttft_s))
    return Predicted(p50_s, p95_s, outcome.goodput_rps, outcome.busy_share)
