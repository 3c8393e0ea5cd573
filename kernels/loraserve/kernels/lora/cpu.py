"""Mixed-rank LoRA on the CPU: weights are read once as they lie in the pool, at their true ranks.

Same signature and meaning as reference.py. A token's result has the same bits alone and in any batch, with any number
of threads: each element is summed in one fixed order (vector_ir.py) and threads share no element.
"""

import torch

from loraserve.kernels import workers
from loraserve.kernels.dense import assert_dense
from loraserve.kernels.lora.batch import LoraBatch
from loraserve.kernels.lora.cpu_kernels import FEW_TOKENS, KERNELS
from loraserve.kernels.lora.tables import LAYOUT_FIELDS, SLICES_MAX, AdapterTables
from loraserve.kernels.workers import run
from loraserve.model_shape import MODULES

TILE_TOKENS = 32
"""Most tokens that share one pass over the weights: their rows of x and h stay in the cache."""
PARTS_PER_THREAD = 4
SHARE_WORK = 1_000_000
"""Work, as ``LoraBatch.work`` counts it, from which a second thread brings more than calling it costs."""

_KERNELS = {torch.float32: KERNELS["float32"], torch.bfloat16: KERNELS["bfloat16"], torch.float16: KERNELS["float16"]}


def add_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    pool: torch.Tensor,
    tables: AdapterTables,
    batch: LoraBatch,
    layer: int,
    module: int,
) -> None:
    """y[t, slice i] += scale_i * (x[t] @ A_i.T) @ B_i^T for every token t with an adapter; see reference.py."""
    if batch.empty:
        return
    out = tables.out_features[module]
    k = tables.in_features[module]
    y_width = sum(out)
    assert_dense(y, (batch.tokens, y_width))
    assert_dense(x, (batch.tokens, k))
    assert pool.is_contiguous(), pool.stride()
    row = layer * len(MODULES) + module
    shared = batch.work(tables)[row] > SHARE_WORK
    tile_tokens = _tile_tokens(batch.perm.numel()) if shared else TILE_TOKENS
    run(
        _KERNELS[pool.dtype],
        shared,
        y.data_ptr(),
        y_width,
        x.data_ptr(),
        k,
        pool.data_ptr(),
        tables.layout.data_ptr() + row * LAYOUT_FIELDS * 8,
        tables.scales.data_ptr() + row * SLICES_MAX * 4,
        tables.shape.layers * len(MODULES),
        tile_tokens,
        len(out),
        batch.groups,
        tables.widths.data_ptr() + module * SLICES_MAX * 8,
        tables.base.data_ptr(),
        batch.perm.data_ptr(),
        batch.group_slot.data_ptr(),
        batch.group_start.data_ptr(),
        1 if shared and _is_scarce(batch, tile_tokens) else len(out),
    )


def _tile_tokens(tokens: int) -> int:
    """Small enough that every thread gets a few parts, large enough that a pass over the weights pays."""
    fair = -(-tokens // (PARTS_PER_THREAD * torch.get_num_threads()))
    return min(TILE_TOKENS, max(FEW_TOKENS, -(-fair // 4) * 4))


def _is_scarce(batch: LoraBatch, tile_tokens: int) -> bool:
    """Whether there are too few tiles for all threads to finish at about the same time."""
    tiles = batch.groups + batch.perm.numel() // tile_tokens
    return tiles < PARTS_PER_THREAD * torch.get_num_threads()


def warm_up(*dtypes: torch.dtype) -> None:
    """Compile, or load from the cache, everything that a step may call with pools of these dtypes, all by default."""
    workers.warm_up()
    for dtype in dtypes or _KERNELS:
        _KERNELS[dtype].warm_up()
