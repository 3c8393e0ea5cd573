"""Adapters in a pool and the activations of a step, on one device."""

import torch

from loraserve.adapter.format import Dtype, SlabHeader, make_uniform_layout
from loraserve.benchmarks.lora.cases import Case
from loraserve.kernels.lora.tables import AdapterTables
from loraserve.model_shape import ModelShape

SPREAD_RANK = 16


class World:
    """An adapter of each rank, on all slices of all layers, in one pool of bfloat16 or float16.

    Weights are such that what LoRA adds is about as large as what it is added to: an error in either shows.
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
        """A of one slice, [rank, in], where it lies in the pool."""
        rank, k = self.ranks[slot], self.tables.in_features[module]
        start = self._row(slot, layer, module) + index * rank * k
        return self.pool[start : start + rank * k].view(rank, k)

    def b(self, slot: int, layer: int, module: int, index: int) -> torch.Tensor:
        """Transposed B of one slice, [rank, out], where it lies in the pool."""
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
    """Inputs and outputs of each module for the tokens of a case: ``x`` [tokens, in], ``y`` [tokens, sum of out]."""

    def __init__(self, world: World, case: Case, seed: int = 1) -> None:
        generator = torch.Generator(world.device).manual_seed(seed)

        def normal(width: int) -> torch.Tensor:
            made = torch.empty(case.tokens, width, dtype=world.dtype, device=world.device)
            return made.normal_(generator=generator)

        self.x = [normal(k) for k in world.tables.in_features]
        self.y = [normal(sum(out)) for out in world.tables.out_features]
