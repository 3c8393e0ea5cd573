"""The compiled part of cpu.py: one kernel per dtype of the adapter pool.

A part of a call is one adapter's slices, all or one, for one tile of its tokens: parts write different elements of y,
and which thread takes which leaves no trace.
"""

from typing import Any

import numpy as np

from loraserve.kernels.compiled import Kernel, called, inlined
from loraserve.kernels.lora.tables import LAYOUT_FIELDS, SLICES_MAX
from loraserve.kernels.memory import floats, int32s, int64s, take_part
from loraserve.kernels.vector_ir import ELEMENT_BYTES, LANES, make_axpy_block, make_dot_block, make_mix_block

ROWS = 4
MIX_VECTORS = 4
FEW_TOKENS = 8
"""Up to this many tokens B is read row after row, as it lies in memory; for more, outputs are held in registers."""
OPERANDS = 18
"""The parts taken, then those of ``cpu.add_lora`` in its order."""


@inlined
def _block_tokens(tokens, i):  # type: ignore[no-untyped-def]
    """How many tokens from i on can be addressed as a first one and a stride: 4, 2 or 1."""
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
    dot_4x4, dot_2x4, dot_1x4 = (make_dot_block(tokens, ROWS, dtype) for tokens in (4, 2, 1))
    dot_1x1 = make_dot_block(1, 1, dtype)

    @called(dtype)
    def shrink(x, k, tokens, a, rank, h):  # type: ignore[no-untyped-def]
        """h[i, r] = x[tokens[i]] . A[r], h dense."""
        whole = rank - rank % ROWS
        i = 0
        while i < len(tokens):
            block = _block_tokens(tokens, i)
            stride = _stride(tokens, i, block) * k
            source = x + tokens[i] * k * 4
            target = h + i * rank * 4
            for row in range(0, whole, ROWS):
                weights = a + row * k * item
                if block == 4:
                    dot_4x4(source, stride, weights, k, k, target + row * 4, rank)
                elif block == 2:
                    dot_2x4(source, stride, weights, k, k, target + row * 4, rank)
                else:
                    dot_1x4(source, stride, weights, k, k, target + row * 4, rank)
            for t in range(block):
                for row in range(whole, rank):
                    place = target + (t * rank + row) * 4
                    dot_1x1(source + t * stride * 4, 0, a + row * k * item, k, k, place, rank)
            i += block

    return shrink


def _make_expand(dtype: str) -> Any:
    item = ELEMENT_BYTES[dtype]
    axpy_4x4, axpy_2x4, axpy_1x4 = (make_axpy_block(tokens, ROWS, dtype) for tokens in (4, 2, 1))
    axpy_1x1 = make_axpy_block(1, 1, dtype)
    mix_4, mix_2, mix_1 = (make_mix_block(tokens, MIX_VECTORS, dtype) for tokens in (4, 2, 1))

    @called(dtype)
    def expand_few(y, y_width, tokens, h, h_stride, rank, b, b_width, columns):  # type: ignore[no-untyped-def]
        """y[tokens[i], :columns] += h[i] @ B[:, :columns]."""
        whole = rank - rank % ROWS
        i = 0
        while i < len(tokens):
            block = _block_tokens(tokens, i)
            stride = _stride(tokens, i, block) * y_width
            target = y + tokens[i] * y_width * 4
            source = h + i * h_stride * 4
            for row in range(0, whole, ROWS):
                weights = b + row * b_width * item
                if block == 4:
                    axpy_4x4(target, stride, source + row * 4, h_stride, weights, b_width, columns)
                elif block == 2:
                    axpy_2x4(target, stride, source + row * 4, h_stride, weights, b_width, columns)
                else:
                    axpy_1x4(target, stride, source + row * 4, h_stride, weights, b_width, columns)
            for t in range(block):
                for row in range(whole, rank):
                    factor = source + (t * h_stride + row) * 4
                    axpy_1x1(target + t * stride * 4, 0, factor, h_stride, b + row * b_width * item, b_width, columns)
            i += block

    @called(dtype)
    def expand_many(y, y_width, tokens, h, h_stride, rank, b, b_width, columns):  # type: ignore[no-untyped-def]
        """The same, MIX_VECTORS vectors of columns at a time."""
        step = MIX_VECTORS * LANES
        for column in range(0, columns, step):
            weights = b + column * item
            ahead = weights + step * item
            i = 0
            while i < len(tokens):
                block = _block_tokens(tokens, i)
                stride = _stride(tokens, i, block) * y_width
                target = y + (tokens[i] * y_width + column) * 4
                source = h + i * h_stride * 4
                if block == 4:
                    mix_4(target, stride, source, h_stride, weights, b_width, rank, ahead)
                elif block == 2:
                    mix_2(target, stride, source, h_stride, weights, b_width, rank, ahead)
                else:
                    mix_1(target, stride, source, h_stride, weights, b_width, rank, ahead)
                i += block

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


def _make_walk(dtype: str) -> Any:
    item = ELEMENT_BYTES[dtype]
    shrink, expand = _make_shrink(dtype), _make_expand(dtype)

    @inlined
    def tile(y, y_width, x, k, slab, layout, scale, first, stop, widths, tokens):  # type: ignore[no-untyped-def]
        """Slices first..stop of one adapter for these tokens, in the order in which the weights lie in memory."""
        column, row, total = 0, 0, 0
        for index in range(stop):
            if index < first:
                column += widths[index]
                row += layout[2 + index]
            else:
                total += layout[2 + index]
        h = np.empty(len(tokens) * total, np.float32)
        shrink(x, k, tokens, slab + (layout[0] + row * k) * item, total, h.ctypes.data)
        done = 0
        for index in range(first, stop):
            rank = layout[2 + index]
            if rank > 0:
                for i in range(len(tokens)):
                    for r in range(i * total + done, i * total + done + rank):
                        h[r] *= scale[index]
                b = slab + layout[2 + SLICES_MAX + index] * item
                source = h.ctypes.data + done * 4
                expand(y + column * 4, y_width, tokens, source, total, rank, b, widths[index])
            done += rank
            column += widths[index]

    @inlined
    def walk(operands):  # type: ignore[no-untyped-def]
        """Take parts until none is left; every thread counts through them in the same order."""
        values = int64s(operands, OPERANDS)
        y, y_width, x, k, pool = values[1], values[2], values[3], values[4], values[5]
        layouts, scales, slot_stride, tile_tokens = values[6], values[7], values[8], values[9]
        slices, groups, part_slices = values[10], values[11], values[17]
        widths, bases = int64s(values[12], slices), values[13]
        perm, group_slot, group_start = values[14], int32s(values[15], groups), int32s(values[16], groups + 1)
        mine = take_part(operands)
        part = 0
        for group in range(groups):
            slot = np.int64(group_slot[group])
            layout = int64s(layouts + slot * slot_stride * LAYOUT_FIELDS * 8, LAYOUT_FIELDS)
            scale = floats(scales + slot * slot_stride * SLICES_MAX * 4, SLICES_MAX)
            slab = pool + int64s(bases + slot * 8, 1)[0] * item
            for start in range(group_start[group], group_start[group + 1], tile_tokens):
                stop = min(start + tile_tokens, np.int64(group_start[group + 1]))
                for index in range(0, slices, part_slices):
                    if part == mine:
                        tokens = int32s(perm + start * 4, stop - start)
                        last = min(index + part_slices, slices)
                        tile(y, y_width, x, k, slab, layout, scale, index, last, widths, tokens)
                        mine = take_part(operands)
                    part += 1

    return walk


_walk_f32, _walk_b16, _walk_f16 = (_make_walk(dtype) for dtype in ELEMENT_BYTES)


# Numba names what it keeps on disk after a function's place in its file: one function for each dtype.
def _add_f32(operands: int) -> None:
    _walk_f32(operands)


def _add_b16(operands: int) -> None:
    _walk_b16(operands)


def _add_f16(operands: int) -> None:
    _walk_f16(operands)


KERNELS = {dtype: Kernel(add) for dtype, add in zip(ELEMENT_BYTES, (_add_f32, _add_b16, _add_f16), strict=True)}
