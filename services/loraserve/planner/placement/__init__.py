"""Placement policies assign copies of adapters to engines, based on forecast demand. They use no I/O and no clock."""

from loraserve.planner.placement import ours, paper
from loraserve.planner.placement.problem import PlacementPolicy

PLACEMENT_POLICIES: dict[str, PlacementPolicy] = {"ours": ours.plan, "loraserve": paper.plan}
"""The policies by their name in the configuration (``planner.policy``)."""
