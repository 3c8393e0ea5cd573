"""The definition of mixed-rank LoRA in plain torch. Every other implementation is held against it."""

import torch

from loraserve.kernels.lora.batch import LoraBatch
from loraserve.kernels.lora.tables import AdapterTables


def add_lora(
    y: torch.Tensor,  # [tokens, sum of out] float32, changed in place
    x: torch.Tensor,  # [tokens, in] float32
    pool: torch.Tensor,  # [elements] float32, bfloat16 or float16
    tables: AdapterTables,
    batch: LoraBatch,
    layer: int,
    module: int,
) -> None:
    """y[t, slice i] += scale_i * (x[t] @ A_i.T) @ B_i^T for every token t with an adapter, in float32."""
    for group in range(batch.group_slot.numel()):
        slot = int(batch.group_slot[group])
        tokens = batch.perm[int(batch.group_start[group]) : int(batch.group_start[group + 1])].long()
        _add_group(y, x, pool, tables, slot, tokens, layer, module)


def _add_group(
    y: torch.Tensor,
    x: torch.Tensor,
    pool: torch.Tensor,
    tables: AdapterTables,
    slot: int,
    tokens: torch.Tensor,
    layer: int,
    module: int,
) -> None:
    base = int(tables.base[slot])
    a_offset, total, *rest = tables.layout[slot, layer, module].tolist()
    if total == 0:
        return
    k = tables.in_features[module]
    a = pool[base + a_offset : base + a_offset + total * k].float().view(total, k)
    h = x[tokens] @ a.T
    column = row = 0
    for index, width in enumerate(tables.out_features[module]):
        rank, b_offset = rest[index], rest[3 + index]
        b = pool[base + b_offset : base + b_offset + rank * width].float().view(rank, width)
        scaled = h[:, row : row + rank] * tables.scales[slot, layer, module, index]
        y[tokens, column : column + width] += scaled @ b
        row, column = row + rank, column + width
