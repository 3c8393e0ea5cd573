"""What the simulator says of the same workload, cluster and policy."""

from math import isfinite
from typing import NamedTuple

from live.cluster import PLAN_INTERVAL_S, REJECT_FACTOR, WARMUP, WINDOW_S
from live.scene import ENGINES
from loraserve.cost.profile import Profile
from loraserve.sim.cluster import Simulation
from loraserve.sim.outcome import SimSettings
from loraserve.sim.policies import policy_named
from loraserve.sim.workload import Workload


class Predicted(NamedTuple):
    """TTFT in seconds, None where the simulated cluster does not serve so many."""

    p50_s: float | None
    p95_s: float | None
    goodput_rps: float
    busy: float
    """Share of time in which an engine computes, mean over engines."""


def predict(workload: Workload, policy: str, profile: Profile, slo_s: float) -> Predicted:
    """The simulator knows no HTTP, no gateway and no bus: its TTFT is the engine's part of it."""
    settings = SimSettings(
        slo_ttft_s=slo_s,
        reject_factor=REJECT_FACTOR,
        plan_interval_s=PLAN_INTERVAL_S,
        window_s=WINDOW_S,
        warmup=WARMUP,
        # A run that is far above the SLO is of interest here as well.
        hopeless=1e6,
    )
    outcome = Simulation(workload, policy_named(policy), profile, ENGINES, settings).run()
    p50_s, p95_s = (value if isfinite(value) else None for value in (outcome.p50_ttft_s, outcome.p95_ttft_s))
    return Predicted(p50_s, p95_s, outcome.goodput_rps, outcome.busy_share)
