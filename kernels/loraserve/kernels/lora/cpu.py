"""Mixed-rank LoRA on the CPU. Weights are read directly from the adapter pool, without padding to a common rank.

``add_lora`` has the signature of the function in reference.py. Each element is summed in one fixed order (see
vector_code.py). A token's result therefore has the same bits in any batch and with any number of threads. There is one
kernel per dtype of the adapter pool.

Several threads compute one call (see cpu/threads.py). Each takes up to 32 tokens of one adapter at a time, for one
slice of the module (such as q of qkv) or for all slices. No two threads write to the same element of y.
"""

from typing import Any

import numpy as np
import torch

from loraserve.kernels.cpu import threads
from loraserve.kernels.cpu.compiled import Kernel, called, inlined
from loraserve.kernels.cpu.operands import (
    OperandBlock,
    assert_dense,
    floats,
    int32s,
    int64s,
    integers,
    reader,
    take_part,
)
from loraserve.kernels.cpu.vector_code import (
    ELEMENT_BYTES,
    LANES,
    block_of_size,
    make_axpy_block,
    make_dot_block,
    make_mix_block,
)
from loraserve.kernels.lora.batch import LoraBatch
from loraserve.kernels.lora.tables import A_OFFSET, B_OFFSETS, LAYOUT_FIELDS, MAX_SLICES, RANKS, AdapterTables
from loraserve.model_shape import MODULES

ROWS = 4
MIX_VECTORS = 4
FEW_TOKENS = 8
"""For up to this many tokens, B is read row by row. For more, the outputs are held in registers."""
TILE_TOKENS = 32
"""Maximum number of tokens per pass over the weights, so that their rows of x and h stay in the cache."""
PARTS_PER_THREAD = 4
SHARED_WORK = 1_000_000
"""Above this value of ``LoraBatch.work`` a second thread saves more time than starting it costs."""


class AddLoraCall(OperandBlock):
    """Operands of the kernels. ``layout`` and ``scales`` point to slot 0's rows for the call's (layer, module)."""

    __slots__ = ()
    _fields_ = (
        *integers("y", "y_width", "x", "k", "pool", "layout", "scales", "tile_tokens", "slices", "groups", "widths"),
        *integers("base", "perm", "group_slot", "group_start"),
        *integers("slot_rows", "part_slices"),  # rows of layout and scales per slot; slices per part
    )


_operands = reader(AddLoraCall)


@inlined
def _block_tokens(tokens, i):  # type: ignore[no-untyped-def]
    """Return the size of the next block of equally spaced token indices: 4, 2 or 1. ``i`` is the block's start."""
    left = len(tokens) - i
    if left >= 4:
        stride = tokens[i + 1] - tokens[i]
        if tokens[i + 2] - tokens[i + 1] == stride and tokens[i + 3] - tokens[i + 2] == stride:
            return 4
    return 2 if left >= 2 else 1


@inlined
def _stride(tokens, i, block):  # type: ignore[no-untyped-def]
    return np.int64(tokens[i + 1] - tokens[i]) if block > 1 else np.int64(0)


def _make_shrink(dtype: str) -> Any:
    item = ELEMENT_BYTES[dtype]
    dot_rows = block_of_size((4, 2, 1), lambda tokens: make_dot_block(tokens, ROWS, dtype))
    dot_1x1 = make_dot_block(1, 1, dtype)

    @called(dtype)
    def shrink(x, k, tokens, a, rank, h):  # type: ignore[no-untyped-def]
        """Compute h[i, r] = x[tokens[i]] . A[r] for a contiguous h [tokens, rank]."""
        whole = rank - rank % ROWS
        i = 0
        while i < len(tokens):
            block = _block_tokens(tokens, i)
            stride = _stride(tokens, i, block) * k
            source = x + tokens[i] * k * 4
            target = h + i * rank * 4
            for row in range(0, whole, ROWS):
                dot_rows(block, (source, stride, a + row * k * item, k, k, target + row * 4, rank))
            for t in range(block):
                for row in range(whole, rank):
                    place = target + (t * rank + row) * 4
                    dot_1x1(source + t * stride * 4, 0, a + row * k * item, k, k, place, rank)
            i += block

    return shrink


def _make_expand_few(dtype: str) -> Any:
    item = ELEMENT_BYTES[dtype]
    axpy_rows = block_of_size((4, 2, 1), lambda tokens: make_axpy_block(tokens, ROWS, dtype))
    axpy_1x1 = make_axpy_block(1, 1, dtype)

    @called(dtype)
    def expand_few(y, y_width, tokens, h, h_stride, rank, b, b_width, columns):  # type: ignore[no-untyped-def]
        """Add h[i] @ B[:, :columns] to y[tokens[i], :columns], reading B row by row."""
        whole = rank - rank % ROWS
        i = 0
        while i < len(tokens):
            block = _block_tokens(tokens, i)
            stride = _stride(tokens, i, block) * y_width
            target = y + tokens[i] * y_width * 4
            source = h + i * h_stride * 4
            for row in range(0, whole, ROWS):
                weights = b + row * b_width * item
                axpy_rows(block, (target, stride, source + row * 4, h_stride, weights, b_width, columns))
            for t in range(block):
                for row in range(whole, rank):
                    factor = source + (t * h_stride + row) * 4
                    axpy_1x1(target + t * stride * 4, 0, factor, h_stride, b + row * b_width * item, b_width, columns)
            i += block

    return expand_few


def _make_expand_many(dtype: str) -> Any:
    item = ELEMENT_BYTES[dtype]
    mix_columns = block_of_size((4, 2, 1), lambda tokens: make_mix_block(tokens, MIX_VECTORS, dtype))

    @called(dtype)
    def expand_many(y, y_width, tokens, h, h_stride, rank, b, b_width, columns):  # type: ignore[no-untyped-def]
        """Compute the result of ``expand_few``, but keep MIX_VECTORS vectors of each output row in registers."""
        step = MIX_VECTORS * LANES
        for column in range(0, columns, step):
            weights = b + column * item
            ahead = weights + step * item
            i = 0
            while i < len(tokens):
                block = _block_tokens(tokens, i)
                stride = _stride(tokens, i, block) * y_width
                target = y + (tokens[i] * y_width + column) * 4
                mix_columns(block, (target, stride, h + i * h_stride * 4, h_stride, weights, b_width, rank, ahead))
                i += block

    return expand_many


def _make_expand(dtype: str) -> Any:
    item = ELEMENT_BYTES[dtype]
    expand_few, expand_many = _make_expand_few(dtype), _make_expand_many(dtype)

    @inlined
    def expand(y, y_width, tokens, h, h_stride, rank, b, b_width):  # type: ignore[no-untyped-def]
        if len(tokens) <= FEW_TOKENS:
            expand_few(y, y_width, tokens, h, h_stride, rank, b, b_width, b_width)
        else:
            whole = b_width - b_width % (MIX_VECTORS * LANES)
            expand_many(y, y_width, tokens, h, h_stride, rank, b, b_width, whole)
            if whole < b_width:
                expand_few(
                    y + whole * 4, y_width, tokens, h, h_stride, rank, b + whole * item, b_width, b_width - whole
                )

    return expand


def _make_add_tile(dtype: str) -> Any:
    item = ELEMENT_BYTES[dtype]
    shrink, expand = _make_shrink(dtype), _make_expand(dtype)

    @inlined
    def add_tile(y, y_width, x, k, slab, layout, scale, first, stop, widths, tokens):  # type: ignore[no-untyped-def]
        """Add one adapter's LoRA output for slices ``first`` to ``stop`` - 1 and ``tokens`` to y."""
        column, row, total = 0, 0, 0
        for index in range(stop):
            if index < first:
                column += widths[index]
                row += layout[RANKS + index]
            else:
                total += layout[RANKS + index]
        h = np.empty(len(tokens) * total, np.float32)
        shrink(x, k, tokens, slab + (layout[A_OFFSET] + row * k) * item, total, h.ctypes.data)
        done = 0
        for index in range(first, stop):
            rank = layout[RANKS + index]
            if rank > 0:
                for i in range(len(tokens)):
                    for r in range(i * total + done, i * total + done + rank):
                        h[r] *= scale[index]
                b = slab + layout[B_OFFSETS + index] * item
                source = h.ctypes.data + done * 4
                expand(y + column * 4, y_width, tokens, source, total, rank, b, widths[index])
            done += rank
            column += widths[index]

    return add_tile


def _make_walk(dtype: str) -> Any:
    item = ELEMENT_BYTES[dtype]
    add_tile = _make_add_tile(dtype)

    @inlined
    def walk(operands):  # type: ignore[no-untyped-def]
        """Compute parts until none is left. Every thread numbers the parts in the same order."""
        o = _operands(operands)
        slices, groups, tile_tokens, part_slices = o.slices, o.groups, o.tile_tokens, o.part_slices
        widths = int64s(o.widths, slices)
        group_slot, group_start = int32s(o.group_slot, groups), int32s(o.group_start, groups + 1)
        mine = take_part(operands)
        part = 0
        for group in range(groups):
            slot = np.int64(group_slot[group])
            layout = int64s(o.layout + slot * o.slot_rows * LAYOUT_FIELDS * 8, LAYOUT_FIELDS)
            scale = floats(o.scales + slot * o.slot_rows * MAX_SLICES * 4, MAX_SLICES)
            slab = o.pool + int64s(o.base + slot * 8, 1)[0] * item
            for start in range(group_start[group], group_start[group + 1], tile_tokens):
                stop = min(start + tile_tokens, np.int64(group_start[group + 1]))
                for index in range(0, slices, part_slices):
                    if part == mine:
                        tokens = int32s(o.perm + start * 4, stop - start)
                        last = min(index + part_slices, slices)
                        add_tile(o.y, o.y_width, o.x, o.k, slab, layout, scale, index, last, widths, tokens)
                        mine = take_part(operands)
                    part += 1

    return walk


_walk_f32, _walk_b16, _walk_f16 = (_make_walk(dtype) for dtype in ELEMENT_BYTES)


# Numba names cache entries by a function's name and line, so each dtype needs its own function.
def _add_f32(operands: int) -> None:
    _walk_f32(operands)


def _add_b16(operands: int) -> None:
    _walk_b16(operands)


def _add_f16(operands: int) -> None:
    _walk_f16(operands)


_KERNELS = {
    torch.float32: Kernel(_add_f32),
    torch.bfloat16: Kernel(_add_b16),
    torch.float16: Kernel(_add_f16),
}


def add_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    pool: torch.Tensor,
    tables: AdapterTables,
    batch: LoraBatch,
    layer: int,
    module: int,
) -> None:
    """Add the LoRA output of each token with an adapter to ``y``. The docstring in reference.py has the formula."""
    if batch.empty:
        return
    out = tables.out_features[module]
    k = tables.in_features[module]
    assert_dense(y, (batch.tokens, sum(out)))
    assert_dense(x, (batch.tokens, k))
    assert pool.is_contiguous(), pool.stride()
    row = layer * len(MODULES) + module
    shared = batch.work(tables)[row] > SHARED_WORK
    tile_tokens = _tile_tokens(batch.perm.numel()) if shared else TILE_TOKENS
    call = AddLoraCall(
        y=y.data_ptr(), y_width=sum(out), x=x.data_ptr(), k=k, pool=pool.data_ptr(),
        layout=tables.layout.data_ptr() + row * LAYOUT_FIELDS * 8,
        scales=tables.scales.data_ptr() + row * MAX_SLICES * 4,
        slot_rows=tables.shape.layers * len(MODULES), tile_tokens=tile_tokens, slices=len(out), groups=batch.groups,
        widths=tables.widths.data_ptr() + module * MAX_SLICES * 8, base=tables.base.data_ptr(),
        perm=batch.perm.data_ptr(), group_slot=batch.group_slot.data_ptr(), group_start=batch.group_start.data_ptr(),
        part_slices=1 if shared and _has_few_tiles(batch, tile_tokens) else len(out),
    )  # fmt: skip
    threads.run(_KERNELS[pool.dtype], call, shared=shared)


def _tile_tokens(tokens: int) -> int:
    """Return the tokens per tile, FEW_TOKENS to TILE_TOKENS, that give each thread about PARTS_PER_THREAD tiles."""
    fair = -(-tokens // (PARTS_PER_THREAD * torch.get_num_threads()))
    return min(TILE_TOKENS, max(FEW_TOKENS, -(-fair // 4) * 4))


def _has_few_tiles(batch: LoraBatch, tile_tokens: int) -> bool:
    """Return whether there are too few tiles to keep all threads equally busy."""
    tiles = batch.groups + batch.perm.numel() // tile_tokens
    return tiles < PARTS_PER_THREAD * torch.get_num_threads()


def warm_up(*dtypes: torch.dtype) -> None:
    """Compile the kernels for pools of these dtypes (default: all), or load them from the disk cache."""
    threads.warm_up()
    for dtype in dtypes or _KERNELS:
        _KERNELS[dtype].warm_up()
