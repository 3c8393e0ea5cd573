"""Mixed-rank LoRA on a CUDA GPU: Triton kernels that read the true ranks on the device and stop there.

Same meaning as reference.py. The same batch gives the same bits: sums have one order, and no two programs add to the
same number.
"""

from functools import cache

import torch

from loraserve.kernels.lora.decode import decode
from loraserve.kernels.lora.expand import expand
from loraserve.kernels.lora.shrink import shrink
from loraserve.kernels.lora.tables import SLICES_MAX, AdapterTables
from loraserve.kernels.lora.tuning import DECODE_TOKENS
from loraserve.kernels.lora.work import LoraWork
from loraserve.model_shape import MODULES

ALIGNED = 16
"""Elements: with rows and widths that are multiples of it, every load may be of 128 bits."""


def add_lora(
    y: torch.Tensor,  # [tokens, sum of out], changed in place
    x: torch.Tensor,  # [tokens, in], the pool's dtype
    pool: torch.Tensor,  # [elements] bfloat16, float16 or float32
    tables: AdapterTables,
    batch: LoraWork,
    layer: int,
    module: int,
) -> None:
    """y[t, slice i] += scale_i * (x[t] @ A_i.T) @ B_i^T for every token t with an adapter; rounded once."""
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
    k, n = _sizes(batch, module)
    decode[(multiprocessors(x.device) * b.programs,)](
        x,
        y,
        pool,
        space.planes,
        space.hidden,
        batch.perm,
        batch.lengths[row],
        batch.tile_a[row],
        batch.tile_place[row],
        space.parts,
        batch.group_b[row],
        batch.group_place[row],
        batch.group_scale[row],
        space.ready,
        space.turnstile,
        batch.tokens,
        space.max_rank,
        k,
        *n,
        b.split,
        pool.dtype != torch.float32,
        *_alignment(k, n),
        len(space.ready),
        b.bm,
        b.br,
        b.bk,
        b.bn,
        b.be,
        b.stages,
        num_warps=b.warps,
        maxnreg=b.registers,
    )


def _prefill(y: torch.Tensor, x: torch.Tensor, pool: torch.Tensor, batch: LoraWork, row: int, module: int) -> None:
    b, space = batch.blocks[module], batch.workspace
    k, n = _sizes(batch, module)
    a_align, b_align = _alignment(k, n)
    grid = (multiprocessors(x.device) * b.programs,)
    lengths, place = batch.lengths[row], batch.group_place[row]
    shrink[grid](
        x,
        pool,
        space.planes,
        space.hidden,
        batch.perm,
        lengths,
        batch.tile_a[row],
        batch.tile_place[row],
        space.parts,
        place,
        batch.group_scale[row],
        batch.tokens,
        space.max_rank,
        k,
        b.split,
        pool.dtype != torch.float32,
        a_align,
        b.bm,
        b.br,
        b.bk,
        b.stages,
        num_warps=b.warps,
    )
    expand[grid](
        y,
        pool,
        space.hidden,
        batch.perm,
        lengths,
        place,
        batch.group_b[row],
        batch.tokens,
        space.max_rank,
        *n,
        pool.dtype != torch.float32,
        b_align,
        b.bm,
        b.bn,
        b.be,
        b.stages,
        num_warps=b.warps,
    )


def _sizes(batch: LoraWork, module: int) -> tuple[int, tuple[int, int, int]]:
    widths = batch.tables.out_features[module]
    n0, n1, n2 = (*widths, *[0] * (SLICES_MAX - len(widths)))
    return batch.tables.in_features[module], (n0, n1, n2)


def _alignment(k: int, n: tuple[int, int, int]) -> tuple[int, int]:
    """What the offsets of A's and B's rows are multiples of; a slab's rows begin at multiples of ALIGNED."""
    a = ALIGNED if k % ALIGNED == 0 else 1
    return a, a if all(width % ALIGNED == 0 for width in n) else 1


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors; one where there is no GPU, as the interpreter runs programs one after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
