"""Policies as a live cluster runs them: settings of planner and router, and where adapters are pinned."""

from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from loraserve.cost import CostModel
from loraserve.planner.placement.problem import PlacementPolicy, PlanInput, PlanSettings
from loraserve.sim.policies import policy_named
from loraserve.sim.workload import Workload
from loraserve.testing.reports import engine_load


class LivePolicy(NamedTuple):
    """``place`` None leaves adapters to the planner; else all are pinned once to where it puts them."""

    name: str
    planner: str
    router: str
    place: PlacementPolicy | None = None

    def settings(self, workload: Workload, engines: int) -> list[str]:
        """For ``--set``."""
        found = [f"planner.policy={self.planner}", f"router.policy={self.router}"]
        if self.place is not None:
            found.append(f"planner.pins={msgspec.json.encode(pins(self.place, workload, engines)).decode()}")
        return found


OURS = LivePolicy("ours", "ours", "predicted")
LORASERVE = LivePolicy("loraserve", "loraserve", "shares")
# The planner's own policy decides nothing where every adapter is pinned.
RANDOM = LivePolicy("slora-random", "ours", "shares", policy_named("slora-random").place)
CONTIGUOUS = LivePolicy("slora-contiguous", "ours", "shares", policy_named("slora-contiguous").place)
LIVE_POLICIES = (OURS, LORASERVE, RANDOM, CONTIGUOUS)


def pins(place: PlacementPolicy, workload: Workload, engines: int) -> Mapping[str, list[str]]:
    """By adapter name, the engines that ``place`` deals it to: as the simulator does it, of the same adapters."""
    adapters = {adapter.version: adapter for adapter in workload.adapters}
    loads = [engine_load(f"engine-{index}") for index in range(engines)]
    pinned: dict[str, list[str]] = {}
    inputs = PlanInput(demand=(), adapters=adapters, engines=loads, cost=CostModel(), settings=PlanSettings())
    for placement in place(inputs):
        pinned.setdefault(placement.name, []).append(placement.engine)
    return pinned
