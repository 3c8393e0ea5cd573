"""The implementations that are timed, their operands, and the check that each must pass before its time counts."""

from typing import Any, Protocol

import torch

from loraserve.adapter.format import Dtype, SlabHeader, make_uniform_layout
from loraserve.benchmarks.lora.cases import LoraCase
from loraserve.kernels.lora import gpu, plan_batch, reference
from loraserve.kernels.lora.tables import AdapterTables
from loraserve.kernels.lora.tuning import Blocks
from loraserve.kernels.lora.work import LoraWork, Workspace
from loraserve.model_shape import MODULES, ModelShape

TOLERANCE = 1e-2
"""Largest error of an element, relative to the largest element. Our result is rounded to bfloat16 once."""
PEER_TOLERANCE = 2e-2
"""Peers round what they add and then the sum; some round h as well."""
SPREAD_RANK = 16


class World:
    """Adapters in a pool on one device: one of each rank, on all slices of all layers, in bfloat16 or float16.

    The weights are scaled so that LoRA adds about as much as it is added to: an error in either shows.
    """

    def __init__(self, shape: ModelShape, ranks: tuple[int, ...], device: str, dtype: torch.dtype) -> None:
        self.shape = shape
        self.ranks = ranks
        self.device = device
        self.dtype = dtype
        self.scales = tuple(2.0 ** (slot % 3 - 1) for slot in range(len(ranks)))
        headers = [self._header(slot) for slot in range(len(ranks))]
        generator = torch.Generator(device).manual_seed(0)
        self.pool = torch.empty(sum(header.elements for header in headers), dtype=dtype, device=device)
        self.pool.normal_(0.0, (shape.hidden * SPREAD_RANK) ** -0.25, generator=generator)
        self.tables = AdapterTables(shape, len(ranks), device)
        self._headers = headers
        self._starts = [0]
        for slot, header in enumerate(headers):
            self.tables.install(slot, header, self._starts[slot])
            self._starts.append(self._starts[slot] + header.elements)

    def a(self, slot: int, layer: int, module: int, index: int) -> torch.Tensor:
        """Return A of one slice, [rank, in], as a view of the pool."""
        rank, k = self.ranks[slot], self.tables.in_features[module]
        start = self._row(slot, layer, module) + index * rank * k
        return self.pool[start : start + rank * k].view(rank, k)

    def b(self, slot: int, layer: int, module: int, index: int) -> torch.Tensor:
        """Return transposed B of one slice, [rank, out], as a view of the pool."""
        rank, out = self.ranks[slot], self.tables.out_features[module]
        before = len(out) * self.tables.in_features[module] + sum(out[:index])
        start = self._row(slot, layer, module) + rank * before
        return self.pool[start : start + rank * out[index]].view(rank, out[index])

    def _row(self, slot: int, layer: int, module: int) -> int:
        return self._starts[slot] + self._headers[slot].row(layer, module).offset

    def _header(self, slot: int) -> SlabHeader:
        dtype: Dtype = "bfloat16" if self.dtype == torch.bfloat16 else "float16"
        return make_uniform_layout(self.shape, dtype, self.ranks[slot], self.scales[slot])


class Operands:
    """Random inputs and outputs of each module for the tokens of a case: x [tokens, in], y [tokens, sum of out]."""

    def __init__(self, world: World, case: LoraCase, seed: int = 1) -> None:
        generator = torch.Generator(world.device).manual_seed(seed)

        def normal(width: int) -> torch.Tensor:
            made = torch.empty(case.tokens, width, dtype=world.dtype, device=world.device)
            return made.normal_(generator=generator)

        self.x = [normal(k) for k in world.tables.in_features]
        self.y = [normal(sum(out)) for out in world.tables.out_features]


class Side(Protocol):
    """One implementation, prepared for one case. What depends on the batch alone is done before ``add``.

    ``knobs`` are the settings that may be tried, by name; ``setting`` holds the choice for each module.
    """

    name: str
    knobs: dict[str, list[Any]]
    setting: list[dict[str, Any]]

    def add(self, y: torch.Tensor, x: torch.Tensor, layer: int, module: int) -> None:
        """Add LoRA of one module to ``y``, in place."""


class Ours:
    """This project's kernels, with the installed tables of tuned block sizes."""

    name = "ours"

    def __init__(self, world: World, case: LoraCase, blocks: tuple[Blocks, ...] | None = None) -> None:
        self._world = world
        space = Workspace(world.tables, case.tokens, max(world.ranks), world.dtype, blocks)
        self._work = LoraWork(world.tables, space, case.tokens, blocks)
        self._slots = torch.tensor(case.slots, dtype=torch.int32, device=world.device)
        self.knobs: dict[str, list[Any]] = {}
        self.setting: list[dict[str, Any]] = [{} for _ in MODULES]
        self.plan()

    def plan(self) -> None:
        """List the step's work, which is done once before its first layer."""
        self._work.plan(self._slots)

    def add(self, y: torch.Tensor, x: torch.Tensor, layer: int, module: int) -> None:
        gpu.add_lora(y, x, self._world.pool, self._world.tables, self._work, layer, module)


def run_layers(side: Side, operands: Operands, layers: int) -> None:
    """Run all modules of all layers in order."""
    for layer in range(layers):
        for module in range(len(MODULES)):
            side.add(operands.y[module], operands.x[module], layer, module)


def largest_error(side: Side, world: World, case: LoraCase, modules: range = range(len(MODULES))) -> float:
    """Return the largest error in the first and the last layer, relative to the largest element; infinite for NaN."""
    batch = plan_batch(torch.tensor(case.slots, dtype=torch.int32))
    worst = 0.0
    for layer in {0, world.shape.layers - 1}:
        operands = Operands(world, case, seed=2 + layer)
        for module in modules:
            y, x = operands.y[module], operands.x[module]
            expected = y.float()
            reference.add_lora(expected, x.float(), world.pool, world.tables, batch, layer, module)
            side.add(y, x, layer, module)
            error = float(((y.float() - expected).abs().max() / expected.abs().max()).item())
            worst = max(worst, error if error == error else float("inf"))
    return worst
