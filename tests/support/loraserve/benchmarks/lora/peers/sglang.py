"""The adapter pool of SGLang's back ends. Rows have room for the largest rank, and adapters use their own rank."""

from typing import NamedTuple

import torch

from loraserve.benchmarks.lora.sides import World
from loraserve.model_shape import MODULES


class SglangPool(NamedTuple):
    """Adapters by layer and module.

    ``a`` is [slots, slices * max_rank, in], with the slices one after another at the adapter's own rank. ``b`` is
    [slots, sum of out, max_rank]. ``ranks`` (int32) and ``scales`` (float32) have one value per slot.
    """

    a: list[list[torch.Tensor]]
    b: list[list[torch.Tensor]]
    ranks: torch.Tensor
    scales: torch.Tensor


def fill_pool(world: World, max_rank: int) -> SglangPool:
    """Return the adapters of ``world`` as SGLang stores them, zero beyond the rank of an adapter."""
    rows = [
        [_filled(world, layer, module, max_rank) for module in range(len(MODULES))]
        for layer in range(world.shape.layers)
    ]
    return SglangPool(
        [[a for a, _ in row] for row in rows],
        [[b for _, b in row] for row in rows],
        torch.tensor(world.ranks, dtype=torch.int32, device=world.device),
        torch.tensor(world.scales, dtype=torch.float32, device=world.device),
    )


def _filled(world: World, layer: int, module: int, max_rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    out, k, slots = world.tables.out_features[module], world.tables.in_features[module], len(world.ranks)
    a = torch.zeros(slots, len(out) * max_rank, k, dtype=world.dtype, device=world.device)
    b = torch.zeros(slots, sum(out), max_rank, dtype=world.dtype, device=world.device)
    for slot, rank in enumerate(world.ranks):
        column = 0
        for index, width in enumerate(out):
            a[slot, index * rank : (index + 1) * rank] = world.a(slot, layer, module, index)
            b[slot, column : column + width, :rank] = world.b(slot, layer, module, index).T
            column += width
    return a, b


def offsets(world: World, module: int) -> tuple[int, ...]:
    """Return the offset of each slice of a module's output, followed by the end of the last slice."""
    found = [0]
    for width in world.tables.out_features[module]:
        found.append(found[-1] + width)
    return tuple(found)
