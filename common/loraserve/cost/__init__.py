"""Cost models that predict step and adapter load times, from datasheets, benchmarks and the engines' reports."""

from loraserve.cost.extents import MIN_EXTENT_BYTES, extent_bytes, largest_extent_bytes
from loraserve.cost.learner import CostLearner
from loraserve.cost.model import LARGEST_SURPRISE, LEARNING_RATE, CostModel, StepShape, mean_step

__all__ = [
    "LARGEST_SURPRISE",
    "LEARNING_RATE",
    "MIN_EXTENT_BYTES",
    "CostLearner",
    "CostModel",
    "StepShape",
    "extent_bytes",
    "largest_extent_bytes",
    "mean_step",
]
