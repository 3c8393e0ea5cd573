"""The placement policies, by their name in the configuration (``planner.policy``)."""

from loraserve.planner.placement import ours, paper
from loraserve.planner.placement.problem import PlacementPolicy

PLACEMENT_POLICIES: dict[str, PlacementPolicy] = {"ours": ours.plan, "loraserve": paper.plan}
