"""Linear layers with the base model's weights on the CPU: y = x W^T + b with fp16 weights and float32 sums.

fp16 weights take half the memory traffic of float32. They are packed into tiles of output columns. A tile is read as
one stream of memory, and each loaded register of weights serves many tokens. Each output adds the inputs' products to
the bias in order, so its bits do not depend on the number of tokens or threads.
"""

from typing import Any

import numpy as np
import torch
from llvmlite import binding, ir
from numba.core import cgutils

from loraserve.kernels.cpu.compiled import I64, Kernel, emitted, inlined, no_result
from loraserve.kernels.cpu.operands import OperandBlock, assert_dense, floats, integers, reader, take_part
from loraserve.kernels.cpu.threads import run
from loraserve.kernels.cpu.vector_code import fma, load_f32, offset, prefetch, splat, store_f32, variable

HAS_AVX512 = bool(binding.get_host_cpu_features().get("avx512f"))
WIDE = 16 if HAS_AVX512 else 8
"""Number of float32 lanes in a vector."""
TILE = 2 * WIDE
"""Output columns of a tile. With AVX-512, a row of a tile fills one cache line."""
ROW_BYTES = 2 * TILE
PARTS = 8
"""Approximate number of parts of a call. A part is a run of adjacent tiles, which one thread reads as one stream."""
AHEAD_BYTES = 4096
"""Prefetch distance of weights. The processor's own prefetcher stops at the end of a page."""
SHARED_WORK = 50_000
"""Above this number of multiply-adds a second thread saves more time than starting it costs."""


class PackedWeight:
    """A weight matrix as fp16 tiles [ceil(out / TILE), in, TILE], with its bias. Columns after ``out`` are zero."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Pack ``weight`` [out, in] and ``bias`` [out] of any dtype. Weights beyond fp16's range become infinite."""
        self.out_features, self.in_features = weight.shape
        tiles = -(-self.out_features // TILE)
        padded = torch.zeros(tiles * TILE, self.in_features, dtype=torch.float16)
        padded[: self.out_features] = weight
        self.tiles = padded.view(tiles, TILE, self.in_features).transpose(1, 2).contiguous()
        self.bias = torch.zeros(tiles * TILE, dtype=torch.float32)
        if bias is not None:
            self.bias[: self.out_features] = bias


class LinearCall(OperandBlock):
    """Operands of ``_linear``. ``k`` is the number of inputs, ``width`` the number of outputs."""

    __slots__ = ()
    _fields_ = integers("y", "x", "tiles", "bias", "tokens", "k", "width")


_operands = reader(LinearCall)


def _make_block(tokens: int, tiles: int) -> Any:
    """Return the intrinsic block(x, x_stride, w, tile_bytes, k, bias, y, y_stride).

    It computes y[t] = bias + x[t] W for ``tokens`` rows and the columns of ``tiles`` adjacent tiles. Strides are in
    elements. ``tile_bytes`` is the distance between tiles.
    """
    vectors = range(2 * tiles)
    cells = [(t, v) for t in range(tokens) for v in vectors]

    @emitted(no_result(8))
    def block(
        builder: Any, x: Any, x_stride: Any, w: Any, tile_bytes: Any, k: Any, bias: Any, y: Any, y_stride: Any
    ) -> None:
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

    return block


def _bytes(count: int) -> Any:
    return ir.Constant(I64, count)


# The largest block has as many sums as fit into registers. Without AVX-512 there are half as many registers.
_LARGEST = 12 if HAS_AVX512 else 4
_block_12, _block_8, _block_6 = (_make_block(min(tokens, _LARGEST), 1) for tokens in (12, 8, 6))
_block_4, _block_3, _block_2, _block_1 = (_make_block(tokens, 1) for tokens in (4, 3, 2, 1))
_pair_2, _pair_1 = (_make_block(tokens, 2) for tokens in (2, 1))


@inlined
def _tile(x, k, w, bias, y, width, tokens):  # type: ignore[no-untyped-def]
    """Compute one tile of columns for all tokens, with the largest blocks of tokens that fit."""
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
    """Compute the last tile and write only its first ``columns`` columns to y."""
    whole = np.empty(tokens * TILE, np.float32)
    _tile(x, k, w, bias, whole.ctypes.data, TILE, tokens)
    for t in range(tokens):
        row = floats(y + t * width * 4, columns)
        for i in range(columns):
            row[i] = whole[t * TILE + i]


@inlined
def _columns(x, k, w, bias, y, width, tokens, column, stop):  # type: ignore[no-untyped-def]
    """Compute columns ``column`` to ``stop`` - 1. ``column`` must be the first column of a tile."""
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
    """Compute parts until none is left. A part is a run of adjacent tiles for all tokens."""
    o = _operands(operands)
    width = o.width
    step = max(1, width // (PARTS * TILE)) * TILE
    column = take_part(operands) * step
    while column < width:
        _columns(o.x, o.k, o.tiles, o.bias, o.y, width, o.tokens, column, min(column + step, width))
        column = take_part(operands) * step


LINEAR = Kernel(_linear)


def linear(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Return x W^T + b, float32 [tokens, out], for a contiguous float32 ``x`` [tokens, in]."""
    tokens = x.shape[0]
    assert_dense(x, (tokens, weight.in_features))
    y = torch.empty(tokens, weight.out_features)
    if tokens == 0:  # a step that finishes no prompt needs no logits
        return y
    call = LinearCall(
        y=y.data_ptr(), x=x.data_ptr(), tiles=weight.tiles.data_ptr(), bias=weight.bias.data_ptr(),
        tokens=tokens, k=weight.in_features, width=weight.out_features,
    )  # fmt: skip
    run(LINEAR, call, shared=tokens * weight.tiles.numel() > SHARED_WORK)
    return y


def warm_up() -> None:
    """Compile the kernel or load it from the disk cache."""
    LINEAR.warm_up()
