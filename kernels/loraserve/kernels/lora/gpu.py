"""Mixed-rank LoRA on a CUDA GPU. The Triton kernels read each adapter's rank on the device and do not pad it.

``add_lora`` computes what reference.py defines. Equal batches give equal bits, because every sum has a fixed order and
no two programs add to the same element.
"""

from functools import cache
from typing import Any

import torch

from loraserve.kernels.lora.decode import decode
from loraserve.kernels.lora.expand import expand
from loraserve.kernels.lora.shrink import shrink
from loraserve.kernels.lora.tables import MAX_SLICES, AdapterTables
from loraserve.kernels.lora.tuning import DECODE_TOKENS
from loraserve.kernels.lora.work import LoraWork
from loraserve.model_shape import MODULES

ALIGNED = 16
"""If row lengths are multiples of this many elements, all loads can be 128 bits wide."""


def add_lora(
    y: torch.Tensor,  # [tokens, sum of out], changed in place
    x: torch.Tensor,  # [tokens, in], the pool's dtype
    pool: torch.Tensor,  # [elements] bfloat16, float16 or float32
    tables: AdapterTables,
    batch: LoraWork,
    layer: int,
    module: int,
) -> None:
    """For each token t with an adapter and each slice i of the module, add its LoRA output to slice i of y[t].

    The output is scale_i * (x[t] @ A_i^T) @ B_i^T, with that adapter's scale_i, A_i and B_i. Each sum is rounded once.
    """
    widths = tables.out_features[module]
    assert tables is batch.tables, "the batch was planned for other tables"
    assert x.shape == (batch.used, tables.in_features[module]), (x.shape, batch.used)
    assert y.shape == (batch.used, sum(widths)), (y.shape, batch.used)
    assert x.dtype == pool.dtype, (x.dtype, pool.dtype)
    assert x.is_contiguous(), x.stride()
    assert y.is_contiguous(), y.stride()
    if batch.used == 0:
        return
    launch = _decode if batch.tokens <= DECODE_TOKENS else _prefill
    launch(y, x, pool, batch, layer * len(MODULES) + module, module)


def _decode(y: torch.Tensor, x: torch.Tensor, pool: torch.Tensor, batch: LoraWork, row: int, module: int) -> None:
    b, space = batch.blocks[module], batch.workspace
    k, widths = batch.tables.in_features[module], _slice_widths(batch, module)
    a_align, b_align = _alignment(k, widths)
    decode[(multiprocessors(x.device) * b.programs,)](
        x=x, y=y, pool=pool, planes=space.planes, hidden=space.hidden, perm=batch.perm, lengths=batch.lengths[row],
        tile_a=batch.tile_a[row], tile_place=batch.tile_place[row], tile_parts=space.tile_parts,
        group_b=batch.group_b[row], group_place=batch.group_place[row], group_scale=batch.group_scale[row],
        group_tiles=space.group_tiles, ticket_counter=space.ticket_counter,
        T=batch.tokens, MAX_RANK=space.max_rank, K=k, **widths,
        SPLIT=b.split, LOW=pool.dtype != torch.float32, A_ALIGN=a_align, B_ALIGN=b_align,
        GROUPS=len(space.group_tiles), BM=b.bm, BR=b.br, BK=b.bk, BN=b.bn, BE=b.be, STAGES=b.stages,
        num_warps=b.warps, maxnreg=b.registers,
    )  # fmt: skip


def _prefill(y: torch.Tensor, x: torch.Tensor, pool: torch.Tensor, batch: LoraWork, row: int, module: int) -> None:
    b, space = batch.blocks[module], batch.workspace
    k, widths = batch.tables.in_features[module], _slice_widths(batch, module)
    a_align, b_align = _alignment(k, widths)
    grid = (multiprocessors(x.device) * b.programs,)
    shared: dict[str, Any] = {
        "pool": pool, "hidden": space.hidden, "perm": batch.perm, "lengths": batch.lengths[row],
        "group_place": batch.group_place[row], "T": batch.tokens, "MAX_RANK": space.max_rank,
        "LOW": pool.dtype != torch.float32, "BM": b.bm, "STAGES": b.stages, "num_warps": b.warps,
    }  # fmt: skip
    shrink[grid](
        x=x, planes=space.planes, tile_a=batch.tile_a[row], tile_place=batch.tile_place[row],
        tile_parts=space.tile_parts, group_scale=batch.group_scale[row],
        K=k, SPLIT=b.split, ALIGN=a_align, BR=b.br, BK=b.bk, **shared,
    )  # fmt: skip
    expand[grid](y=y, group_b=batch.group_b[row], ALIGN=b_align, BN=b.bn, BE=b.be, **widths, **shared)


def _slice_widths(batch: LoraWork, module: int) -> dict[str, int]:
    """Return the operands N0, N1 and N2, the output widths of the module's slices. Missing slices have width 0."""
    widths = batch.tables.out_features[module]
    return {f"N{i}": widths[i] if i < len(widths) else 0 for i in range(MAX_SLICES)}


def _alignment(k: int, widths: dict[str, int]) -> tuple[int, int]:
    """Return the alignment, in elements, of the rows of A and of B."""
    a = ALIGNED if k % ALIGNED == 0 else 1
    return a, a if all(width % ALIGNED == 0 for width in widths.values()) else 1


@cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors. It is 1 in Triton's interpreter, which runs programs one by one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
