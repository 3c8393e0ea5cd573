"""The compiled part of cpu.py. A part of a call is some neighbouring tiles of columns, for all tokens."""

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from loraserve.kernels.compiled import Kernel, inlined
from loraserve.kernels.memory import floats, int64s, take_part
from loraserve.kernels.vector_ir import I64, fma, load_f32, offset, prefetch, splat, store_f32, variable

HAS_AVX512 = bool(binding.get_host_cpu_features().get("avx512f"))
WIDE = 16 if HAS_AVX512 else 8
"""Lanes of a vector."""
TILE = 2 * WIDE
"""Columns of a tile: a cache line of weights in each of its rows."""
ROW_BYTES = 2 * TILE
PARTS = 8
"""A call is cut into about so many: neighbouring tiles are one stream of memory, which is best read by one thread."""
AHEAD_BYTES = 4096
"""Weights are asked of the memory this long before they are used: the processor's own look-ahead ends with a page."""
OPERANDS = 8


def _make_block(tokens: int, tiles: int) -> Any:
    """Intrinsic block(x, x_stride, w, tile_bytes, k, bias, y, y_stride): y[t] = bias + x[t] W for adjacent tiles.

    Everything is an address or a count of elements; a tile's rows are ``ROW_BYTES`` apart.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, x_stride, w, tile_bytes, k, bias, y, y_stride = arguments
        vectors = range(2 * tiles)
        cells = [(t, v) for t in range(tokens) for v in vectors]
        x_rows = [offset(builder, x, builder.mul(x_stride, ir.Constant(I64, t)), 4) for t in range(tokens)]
        y_rows = [offset(builder, y, builder.mul(y_stride, ir.Constant(I64, t)), 4) for t in range(tokens)]
        first = [load_f32(builder, builder.add(bias, _bytes(4 * WIDE * v)), "float32", WIDE) for v in vectors]
        sums = {(t, v): variable(builder, first[v]) for t, v in cells}
        starts = [builder.add(w, builder.mul(tile_bytes, ir.Constant(I64, tile))) for tile in range(tiles)]
        with cgutils.for_range_slice(builder, ir.Constant(I64, 0), k, ir.Constant(I64, 1), I64) as (index, _):
            rows = [offset(builder, start, index, ROW_BYTES) for start in starts]
            for row in rows:
                prefetch(builder, builder.add(row, _bytes(AHEAD_BYTES)), 1, near=True)
            weights = [
                load_f32(builder, builder.add(rows[v // 2], _bytes(v % 2 * ROW_BYTES // 2)), "float16", WIDE)
                for v in vectors
            ]
            for t in range(tokens):
                factor = load_f32(builder, offset(builder, x_rows[t], index, 4), "float32", 1)
                wide = splat(builder, factor, WIDE)
                for v in vectors:
                    builder.store(fma(builder, wide, weights[v], builder.load(sums[t, v])), sums[t, v])
        for t, v in cells:
            store_f32(builder, builder.add(y_rows[t], _bytes(4 * WIDE * v)), builder.load(sums[t, v]))
        return context.get_dummy_value()

    def block(typingctx: Any, x: Any, xs: Any, w: Any, tb: Any, k: Any, bias: Any, y: Any, ys: Any) -> Any:
        return types.none(*([types.int64] * 8)), codegen

    return intrinsic(block)


def _bytes(count: int) -> Any:
    return ir.Constant(I64, count)


# A block's sums fill the registers; without AVX-512 there are half as many.
_LARGEST = 12 if HAS_AVX512 else 4
_block_12, _block_8, _block_6 = (_make_block(min(tokens, _LARGEST), 1) for tokens in (12, 8, 6))
_block_4, _block_3, _block_2, _block_1 = (_make_block(tokens, 1) for tokens in (4, 3, 2, 1))
_pair_2, _pair_1 = (_make_block(tokens, 2) for tokens in (2, 1))


@inlined
def _tile(x, k, w, bias, y, width, tokens):  # type: ignore[no-untyped-def]
    """One tile of columns for all tokens, the largest blocks first."""
    t = 0
    while t < tokens:
        left = min(tokens - t, _LARGEST)
        source, target = x + t * k * 4, y + t * width * 4
        if left >= 12:
            _block_12(source, k, w, 0, k, bias, target, width)
            t += 12
        elif left >= 8:
            _block_8(source, k, w, 0, k, bias, target, width)
            t += 8
        elif left >= 6:
            _block_6(source, k, w, 0, k, bias, target, width)
            t += 6
        elif left >= 4:
            _block_4(source, k, w, 0, k, bias, target, width)
            t += 4
        elif left == 3:
            _block_3(source, k, w, 0, k, bias, target, width)
            t += 3
        elif left == 2:
            _block_2(source, k, w, 0, k, bias, target, width)
            t += 2
        else:
            _block_1(source, k, w, 0, k, bias, target, width)
            t += 1


@inlined
def _last_tile(x, k, w, bias, y, width, tokens, columns):  # type: ignore[no-untyped-def]
    """A tile of which only ``columns`` belong to y."""
    whole = np.empty(tokens * TILE, np.float32)
    _tile(x, k, w, bias, whole.ctypes.data, TILE, tokens)
    for t in range(tokens):
        row = floats(y + t * width * 4, columns)
        for i in range(columns):
            row[i] = whole[t * TILE + i]


@inlined
def _columns(x, k, w, bias, y, width, tokens, column, stop):  # type: ignore[no-untyped-def]
    """Columns from ``column``, which begins a tile, to ``stop``."""
    tile_bytes = k * ROW_BYTES
    while column < stop:
        weights, first, target = w + column // TILE * tile_bytes, bias + column * 4, y + column * 4
        left = stop - column
        if tokens <= 2 and left >= 2 * TILE:
            if tokens == 2:
                _pair_2(x, k, weights, tile_bytes, k, first, target, width)
            else:
                _pair_1(x, k, weights, tile_bytes, k, first, target, width)
            column += 2 * TILE
        elif left >= TILE:
            _tile(x, k, weights, first, target, width, tokens)
            column += TILE
        else:
            _last_tile(x, k, weights, first, target, width, tokens, left)
            column = stop


def _linear(operands):  # type: ignore[no-untyped-def]
    values = int64s(operands, OPERANDS)
    y, x, w, bias, tokens, k, width = values[1], values[2], values[3], values[4], values[5], values[6], values[7]
    step = max(1, width // (PARTS * TILE)) * TILE
    column = take_part(operands) * step
    while column < width:
        _columns(x, k, w, bias, y, width, tokens, column, min(column + step, width))
        column = take_part(operands) * step


LINEAR = Kernel(_linear)
