"""Implementations that are timed beside each other, and the check that each passes before its time counts."""

from typing import Any, Protocol

import torch

from loraserve.benchmarks.lora.cases import Case
from loraserve.benchmarks.lora.world import Operands, World
from loraserve.kernels.lora import gpu, plan_batch, reference
from loraserve.kernels.lora.tuning import Blocks
from loraserve.kernels.lora.work import LoraWork, Workspace
from loraserve.model_shape import MODULES

TOLERANCE = 1e-2
"""Largest error of an element, in parts of the largest element: the result is rounded to bfloat16 once."""
PEER_TOLERANCE = 2e-2
"""They round what they add, some of them h as well, and then the sum."""


class Side(Protocol):
    """One implementation, prepared for one case; what depends on the batch alone is done before ``add``.

    ``knobs`` are settings that may be tried, by name; ``setting`` holds the choice of each module.
    """

    name: str
    knobs: dict[str, list[Any]]
    setting: list[dict[str, Any]]

    def add(self, y: torch.Tensor, x: torch.Tensor, layer: int, module: int) -> None:
        """Add LoRA of one module to ``y``, in place."""


class Ours:
    """This project's kernels, with the tables of tuned sizes that are installed."""

    name = "ours"

    def __init__(self, world: World, case: Case, blocks: tuple[Blocks, ...] | None = None) -> None:
        self._world = world
        space = Workspace(world.tables, case.tokens, max(world.ranks), world.dtype, blocks)
        self._work = LoraWork(world.tables, space, case.tokens, blocks)
        self._slots = torch.tensor(case.slots, dtype=torch.int32, device=world.device)
        self.knobs: dict[str, list[Any]] = {}
        self.setting: list[dict[str, Any]] = [{} for _ in MODULES]
        self.plan()

    def plan(self) -> None:
        """What a step does once, before its first layer."""
        self._work.plan(self._slots)

    def add(self, y: torch.Tensor, x: torch.Tensor, layer: int, module: int) -> None:
        gpu.add_lora(y, x, self._world.pool, self._world.tables, self._work, layer, module)


def run_layers(side: Side, operands: Operands, layers: int) -> None:
    """All modules of all layers, in their order."""
    for layer in range(layers):
        for module in range(len(MODULES)):
            side.add(operands.y[module], operands.x[module], layer, module)


def error(side: Side, world: World, case: Case, modules: range = range(len(MODULES))) -> float:
    """Largest error over the first and the last layer, of the largest element; infinite where a number is NaN."""
    batch = plan_batch(torch.tensor(case.slots, dtype=torch.int32))
    worst = 0.0
    for layer in {0, world.shape.layers - 1}:
        operands = Operands(world, case, seed=2 + layer)
        for module in modules:
            y, x = operands.y[module], operands.x[module]
            expected = y.float()
            reference.add_lora(expected, x.float(), world.pool, world.tables, batch, layer, module)
            side.add(y, x, layer, module)
            off = float(((y.float() - expected).abs().max() / expected.abs().max()).item())
            worst = max(worst, off if off == off else float("inf"))
    return worst
