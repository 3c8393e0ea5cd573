"""Mixed-rank LoRA on the CPU: weights are read once as they lie in the pool, at their true ranks.

Same signature and meaning as reference.py. A token's result has the same bits alone and in any batch, with any number
of threads: each element is summed in one fixed order (vector_ir.py) and threads share no element.
"""

from typing import Any

import numpy as np
import torch
from numba import njit

from loraserve.kernels.dense import assert_dense
from loraserve.kernels.lora.batch import LoraBatch, plan_batch
from loraserve.kernels.lora.tables import AdapterTables
from loraserve.kernels.vector_ir import make_axpy_block, make_dot_block
from loraserve.kernels.workers import MAX_PARTS, parts, run_parts
from loraserve.model_shape import ModelShape

TILE_TOKENS = 32
"""Tokens that share one pass over the weights; their rows of x and h stay in the cache."""
TILE_COLUMNS = 512
ROWS = 4
MAX_TOTAL_RANK = 3 * 256
SHARE_WORK_ELEMENTS = 200_000
"""Weights times tokens below which waking another thread costs more than it brings."""

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
_KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
_BYTES = (4, 2, 2)

_dot_1x4_f32, _dot_1x4_b16, _dot_1x4_f16 = (make_dot_block(1, ROWS, d) for d in ("float32", "bfloat16", "float16"))
_dot_1x1_f32, _dot_1x1_b16, _dot_1x1_f16 = (make_dot_block(1, 1, d) for d in ("float32", "bfloat16", "float16"))
_dot_2x4_f32, _dot_2x4_b16, _dot_2x4_f16 = (make_dot_block(2, ROWS, d) for d in ("float32", "bfloat16", "float16"))
_axpy_1x4_f32, _axpy_1x4_b16, _axpy_1x4_f16 = (make_axpy_block(1, ROWS, d) for d in ("float32", "bfloat16", "float16"))
_axpy_1x1_f32, _axpy_1x1_b16, _axpy_1x1_f16 = (make_axpy_block(1, 1, d) for d in ("float32", "bfloat16", "float16"))
_axpy_2x4_f32, _axpy_2x4_b16, _axpy_2x4_f16 = (make_axpy_block(2, ROWS, d) for d in ("float32", "bfloat16", "float16"))


@njit(cache=True, nogil=True)
def _dot(kind, tokens, rows, x, x_stride, a, k, out, out_stride):  # type: ignore[no-untyped-def]
    if tokens == 2:
        if kind == BFLOAT16:
            _dot_2x4_b16(x, x_stride, a, k, k, out, out_stride)
        elif kind == FLOAT16:
            _dot_2x4_f16(x, x_stride, a, k, k, out, out_stride)
        else:
            _dot_2x4_f32(x, x_stride, a, k, k, out, out_stride)
    elif rows == ROWS:
        if kind == BFLOAT16:
            _dot_1x4_b16(x, x_stride, a, k, k, out, out_stride)
        elif kind == FLOAT16:
            _dot_1x4_f16(x, x_stride, a, k, k, out, out_stride)
        else:
            _dot_1x4_f32(x, x_stride, a, k, k, out, out_stride)
    elif kind == BFLOAT16:
        _dot_1x1_b16(x, x_stride, a, k, k, out, out_stride)
    elif kind == FLOAT16:
        _dot_1x1_f16(x, x_stride, a, k, k, out, out_stride)
    else:
        _dot_1x1_f32(x, x_stride, a, k, k, out, out_stride)


@njit(cache=True, nogil=True)
def _axpy(kind, tokens, rows, y, y_stride, h, h_stride, b, b_stride, n):  # type: ignore[no-untyped-def]
    if tokens == 2:
        if kind == BFLOAT16:
            _axpy_2x4_b16(y, y_stride, h, h_stride, b, b_stride, n)
        elif kind == FLOAT16:
            _axpy_2x4_f16(y, y_stride, h, h_stride, b, b_stride, n)
        else:
            _axpy_2x4_f32(y, y_stride, h, h_stride, b, b_stride, n)
    elif rows == ROWS:
        if kind == BFLOAT16:
            _axpy_1x4_b16(y, y_stride, h, h_stride, b, b_stride, n)
        elif kind == FLOAT16:
            _axpy_1x4_f16(y, y_stride, h, h_stride, b, b_stride, n)
        else:
            _axpy_1x4_f32(y, y_stride, h, h_stride, b, b_stride, n)
    elif kind == BFLOAT16:
        _axpy_1x1_b16(y, y_stride, h, h_stride, b, b_stride, n)
    elif kind == FLOAT16:
        _axpy_1x1_f16(y, y_stride, h, h_stride, b, b_stride, n)
    else:
        _axpy_1x1_f32(y, y_stride, h, h_stride, b, b_stride, n)


@njit(cache=True, nogil=True)
def _shrink(kind, item, x, k, tokens, a, total, h):  # type: ignore[no-untyped-def]
    """h[i, r] = x[tokens[i]] . A[r] for one tile; ``tokens`` are indices into x, h is dense."""
    count = len(tokens)
    for row in range(0, total - total % ROWS, ROWS):
        start = a + row * k * item
        i = 0
        while i + 1 < count:
            stride = (tokens[i + 1] - tokens[i]) * k
            _dot(kind, 2, ROWS, x + tokens[i] * k * 4, stride, start, k, h + (i * total + row) * 4, total)
            i += 2
        if i < count:
            _dot(kind, 1, ROWS, x + tokens[i] * k * 4, 0, start, k, h + (i * total + row) * 4, total)
    for row in range(total - total % ROWS, total):
        for i in range(count):
            _dot(kind, 1, 1, x + tokens[i] * k * 4, 0, a + row * k * item, k, h + (i * total + row) * 4, total)


@njit(cache=True, nogil=True)
def _expand(kind, item, y, width, tokens, h, total, first, rank, b, n, column):  # type: ignore[no-untyped-def]
    """y[tokens[i], column:column+n] += h[i, first:first+rank] @ B for one tile and one slice."""
    count = len(tokens)
    step = n if count == 1 else TILE_COLUMNS
    for begin in range(0, n, step):
        size = min(step, n - begin)
        for row in range(0, rank - rank % ROWS, ROWS):
            start = b + (row * n + begin) * item
            i = 0
            while i < count:
                target = y + (tokens[i] * width + column + begin) * 4
                source = h + (i * total + first + row) * 4
                pair = 2 if i + 1 < count else 1
                stride = (tokens[i + 1] - tokens[i]) * width if pair == 2 else 0
                _axpy(kind, pair, ROWS, target, stride, source, total, start, n, size)
                i += pair
        for row in range(rank - rank % ROWS, rank):
            for i in range(count):
                target = y + (tokens[i] * width + column + begin) * 4
                source = h + (i * total + first + row) * 4
                _axpy(kind, 1, 1, target, 0, source, total, b + (row * n + begin) * item, n, size)


@njit(cache=True, nogil=True)
def _tile(kind, item, y, width, x, k, pool, layout, scales, tokens, widths, h):  # type: ignore[no-untyped-def]
    """Everything for one tile of tokens that share an adapter."""
    total = layout[1]
    address = h.ctypes.data
    _shrink(kind, item, x, k, tokens, pool + layout[0] * item, total, address)
    first = 0
    column = 0
    for index in range(len(widths)):
        rank = layout[2 + index]
        if rank > 0:
            for i in range(len(tokens)):
                for r in range(first, first + rank):
                    h[i * total + r] *= scales[index]
            b = pool + layout[5 + index] * item
            _expand(kind, item, y, width, tokens, address, total, first, rank, b, widths[index], column)
        first += rank
        column += widths[index]


@njit(cache=True, nogil=True)
def add_lora_part(  # type: ignore[no-untyped-def]
    part, count, kind, item, y, width, x, k, pool, layout, scales, base, perm, group_slot, group_start, widths, scratch
):
    """This part's share of one call: whole tiles, given out by cost to the least loaded part."""
    loads = np.zeros(count, np.int64)
    for group in range(len(group_slot)):
        slot = group_slot[group]
        total = layout[slot, 1]
        if total == 0:
            continue
        for start in range(group_start[group], group_start[group + 1], TILE_TOKENS):
            stop = min(start + TILE_TOKENS, group_start[group + 1])
            least = 0
            for other in range(1, count):
                if loads[other] < loads[least]:
                    least = other
            loads[least] += total * (stop - start + 1)
            if least == part:
                _tile(
                    kind,
                    item,
                    y,
                    width,
                    x,
                    k,
                    pool + base[slot] * item,
                    layout[slot],
                    scales[slot],
                    perm[start:stop],
                    widths,
                    scratch[part],
                )


_scratch = np.empty((MAX_PARTS, TILE_TOKENS * MAX_TOTAL_RANK), np.float32)
_widths: dict[tuple[int, ...], Any] = {}


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
    assert_dense(y, (batch.tokens, sum(out)))
    assert_dense(x, (batch.tokens, k))
    kind = _KINDS[pool.dtype]
    widths = _widths.get(out)
    if widths is None:
        widths = _widths[out] = np.array(out, np.int64)
    arguments = (
        kind,
        _BYTES[kind],
        y.data_ptr(),
        y.shape[1],
        x.data_ptr(),
        k,
        pool.data_ptr(),
        tables.layout.numpy()[:, layer, module],
        tables.scales.numpy()[:, layer, module],
        tables.base.numpy(),
        batch.perm.numpy(),
        batch.group_slot.numpy(),
        batch.group_start.numpy(),
        widths,
        _scratch,
    )
    count = parts() if batch.perm.numel() * k * ROWS > SHARE_WORK_ELEMENTS else 1
    run_parts(add_lora_part, count, arguments)


def warm_up() -> None:
    """Compile, or load from the cache, everything that a step may call."""
    shape = ModelShape(layers=1, hidden=16, heads=1, kv_heads=1, head_dim=16, ffn=16, vocab=16)
    tables = AdapterTables(shape, 1)
    width = sum(tables.out_features[0])
    for dtype in _KINDS:
        y, x = torch.zeros(1, width), torch.zeros(1, tables.in_features[0])
        add_lora(y, x, torch.zeros(16, dtype=dtype), tables, plan_batch(torch.zeros(1, dtype=torch.int32)), 0, 0)
