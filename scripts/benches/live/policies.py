"""The compared policies as settings of a live cluster: planner, router and pins."""

from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from loraserve.cost import CostModel
from loraserve.planner.placement.problem import PlacementPolicy, PlanInput, PlanSettings
from loraserve.sim.policies import policy_named
from loraserve.sim.workload import Workload
from loraserve.testing.reports import engine_capabilities


class LivePolicy(NamedTuple):
    """A policy. If ``place`` is None, the planner places adapters. Otherwise pins follow ``place``."""

    name: str
    planner: str
    router: str
    place: PlacementPolicy | None = None

    def settings(self, workload: Workload, engines: int) -> list[str]:
        """Return section.key=value settings."""
        found = [f"planner.policy={self.planner}", f"router.policy={self.router}"]
        if self.place is not None:
            found.append(f"planner.pins={msgspec.json.encode(pins(self.place, workload, engines)).decode()}")
        return found


OURS = LivePolicy("ours", "ours", "predicted")
LORASERVE = LivePolicy("loraserve", "loraserve", "shares")
# With every adapter pinned, the planner's own policy has no effect.
RANDOM = LivePolicy("slora-random", "ours", "shares", policy_named("slora-random").place)
CONTIGUOUS = LivePolicy("slora-contiguous", "ours", "shares", policy_named("slora-contiguous").place)
LIVE_POLICIES = (OURS, LORASERVE, RANDOM, CONTIGUOUS)


def pins(place: PlacementPolicy, workload: Workload, engines: int) -> Mapping[str, list[str]]:
    """Return the engines of each adapter by name, as ``place`` assigns them in the simulator."""
    adapters = {adapter.version: adapter for adapter in workload.adapters}
    loads = [engine_capabilities(f"engine-{index}") for index in range(engines)]
    pinned: dict[str, list[str]] = {}
    inputs = PlanInput(demand=(), adapters=adapters, engines=loads, cost=CostModel(), settings=PlanSettings())
    for placement in place(inputs):
        pinned.setdefault(placement.name, []).append(placement.engine)
    return pinned
