"""Mixed-rank LoRA in plain torch. Tests compare all other implementations with it."""

import torch

from loraserve.kernels.lora.batch import LoraBatch
from loraserve.kernels.lora.tables import A_OFFSET, A_ROWS, B_OFFSETS, RANKS, AdapterTables


def add_lora(
    y: torch.Tensor,  # [tokens, sum of out] float32, changed in place
    x: torch.Tensor,  # [tokens, in] float32
    pool: torch.Tensor,  # [elements] float32, bfloat16 or float16
    tables: AdapterTables,
    batch: LoraBatch,
    layer: int,
    module: int,
) -> None:
    """For each token t with an adapter and each slice i of the module, add its LoRA output to slice i of y[t].

    The output is scale_i * (x[t] @ A_i^T) @ B_i^T in float32, with that adapter's scale_i, A_i and B_i.
    """
    for group in range(batch.group_slot.numel()):
        slot = int(batch.group_slot[group])
        tokens = batch.perm[int(batch.group_start[group]) : int(batch.group_start[group + 1])].long()
        _add_group(y, x, pool, tables, slot, tokens, layer, module)


def _add_group(
    y: torch.Tensor, x: torch.Tensor, pool: torch.Tensor, tables: AdapterTables, slot: int, tokens: torch.Tensor,
    layer: int, module: int,
) -> None:  # fmt: skip
    base = int(tables.base[slot])
    layout = tables.layout[slot, layer, module].tolist()
    if layout[A_ROWS] == 0:
        return
    k = tables.in_features[module]
    a_start, a_rows = base + layout[A_OFFSET], layout[A_ROWS]
    a = pool[a_start : a_start + a_rows * k].float().view(a_rows, k)
    h = x[tokens] @ a.T
    column = row = 0
    for index, width in enumerate(tables.out_features[module]):
        rank, b_start = layout[RANKS + index], base + layout[B_OFFSETS + index]
        b = pool[b_start : b_start + rank * width].float().view(rank, width)
        scaled = h[:, row : row + rank] * tables.scales[slot, layer, module, index]
        y[tokens, column : column + width] += scaled @ b
        row, column = row + rank, column + width
