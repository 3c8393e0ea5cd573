"""Placement policies by the name that the configuration gives them."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from loraserve.cost import CostModel
from loraserve.messages import AdapterDemand, AdapterRef, EngineLoad, Placement
from loraserve.planner.placement import ours, paper
from loraserve.planner.placement.problem import PlanSettings


class Planner(Protocol):
    """Where copies live from now on, of what is expected, what there is, and where they are. Pure."""

    def __call__(
        self,
        demand: Sequence[AdapterDemand],
        adapters: Mapping[str, AdapterRef],
        engines: Sequence[EngineLoad],
        current: Sequence[Placement],
        cost: CostModel,
        settings: PlanSettings,
    ) -> tuple[Placement, ...]: ...


PLANNERS: dict[str, Planner] = {"ours": ours.plan, "loraserve": paper.plan}
