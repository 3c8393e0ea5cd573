"""The cost model that is learned from simulated engines, whose steps take exactly the time of their profile."""

import pytest

from loraserve.cost import CostModel
from loraserve.cost.profile import Profile, read_profile
from loraserve.messages import EngineLoad
from loraserve.sim.cluster import Simulation
from loraserve.sim.outcome import SimSettings
from loraserve.sim.policies import policy_named
from loraserve.sim.workload import WorkloadShape, draw_workload
from loraserve.testing.small_profile import small_profile

SECONDS = 25
LEARNED = (
    "step_base_s",
    "sequence_s",
    "kv_token_s",
    "prefill_token_s",
    "padded_decode_s",
    "padded_prefill_s",
    "load_base_s",
    "load_byte_s",
)


class Watched(Simulation):
    """A simulation whose learned cost model can be read."""

    @property
    def believed(self) -> CostModel:
        return self._learner.cost

    def reports(self) -> list[EngineLoad]:
        return [engine.report(self._timeline.now_s)[0] for engine in self.engines.values()]


def served(shape: WorkloadShape, rps: float, profile: Profile, policy: str = "ours") -> Watched:
    workload = draw_workload(shape, profile.engine.slab_bytes_per_rank).at(rps)
    settings = SimSettings(plan_interval_s=10.0, window_s=20.0)
    simulation = Watched(workload, policy_named(policy), profile, engines=4, settings=settings)
    outcome = simulation.run()
    assert not outcome.hopeless
    assert all(report.speed.prefill_step and report.speed.load for report in simulation.reports()), (
        "all had to learn from"
    )
    return simulation


def check(believed: CostModel, true: CostModel) -> None:
    for name in LEARNED:
        assert getattr(believed, name) == pytest.approx(getattr(true, name), rel=1e-6), name


@pytest.mark.parametrize("policy", ["ours", "slora-random"])
@pytest.mark.parametrize("lengths", ["prefill-heavy", "chat", "decode-heavy"])
def test_learned_cost_equals_the_profile(lengths: str, policy: str) -> None:
    profile = read_profile("llama-3-8b-a100-padded")
    rps = 13.0
    simulation = served(WorkloadShape(lengths=lengths, requests=int(SECONDS * rps)), rps, profile, policy)
    check(simulation.believed, profile.cost)


def test_learned_cost_equals_the_profile_with_a_small_pool_that_loads_all_the_time() -> None:
    profile = small_profile()
    simulation = served(WorkloadShape(adapters=80, ranks="mostly-large", requests=600), 25.0, profile)
    check(simulation.believed, profile.cost)
