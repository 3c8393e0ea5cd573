"""Generates the vector code of CPU attention: scores of a group of keys, and softmax of a row of scores."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from loraserve.kernels.cpu.compiled import I64, emitted, no_result
from loraserve.kernels.cpu.vector_code import (
    F32,
    I32,
    LANES,
    LINE_BYTES,
    STEP,
    VF32,
    fma,
    load_f32,
    most_sums,
    offset,
    prefetch,
    splat,
    store_f32,
    sum_lanes,
    variable,
)

VI32 = ir.VectorType(I32, LANES)
SMALLEST_EXPONENT = -87.0
"""``_exp`` returns 0 below this exponent, where e**x is not a normal float32."""


def make_score_block(rows: int, positions: int) -> Any:
    """Return the intrinsic score(q, q_stride, keys, dim, out, out_stride, ahead).

    It computes out[row, p] = q[row] . keys[:, p] for float32 ``keys`` [dim, positions]. Even and odd dimensions are
    summed separately, then added. It also prefetches the memory at address ``ahead``, which the caller reads next.
    """
    vectors = positions // LANES
    at_once = min(vectors, max(1, most_sums() // (2 * rows)))

    @emitted(no_result(7))
    def score(builder: Any, *operands: Any) -> None:
        for first in range(0, vectors, at_once):
            _score_columns(builder, operands, rows, range(first, min(first + at_once, vectors)), positions)

    return score


def _score_columns(builder: Any, operands: Any, rows: int, columns: range, positions: int) -> None:
    q, q_stride, keys, dim, out, out_stride, ahead = operands
    zero = ir.Constant(VF32, [0.0] * LANES)
    cells = [(row, v) for row in range(rows) for v in columns]
    sums = {(cell, odd): variable(builder, zero) for cell in cells for odd in range(2)}

    def add_dimension(index: Any, odd: int) -> None:
        start = offset(builder, keys, index, 4 * positions)
        if columns.start == 0:
            prefetch(builder, offset(builder, ahead, index, 4 * positions), -(-4 * positions // LINE_BYTES), near=False)
        loaded = {
            v: load_f32(builder, builder.add(start, ir.Constant(I64, 4 * LANES * v)), "float32", LANES) for v in columns
        }
        for row in range(rows):
            at = builder.add(builder.mul(q_stride, ir.Constant(I64, row)), index)
            factor = splat(builder, load_f32(builder, offset(builder, q, at, 4), "float32", 1))
            for v in columns:
                slot = sums[(row, v), odd]
                builder.store(fma(builder, factor, loaded[v], builder.load(slot)), slot)

    even = builder.and_(dim, ir.Constant(I64, -2))
    with cgutils.for_range_slice(builder, ir.Constant(I64, 0), even, ir.Constant(I64, 2), I64) as (index, _):
        add_dimension(index, 0)
        add_dimension(builder.add(index, ir.Constant(I64, 1)), 1)
    with cgutils.for_range_slice(builder, even, dim, ir.Constant(I64, 1), I64) as (index, _):
        add_dimension(index, 0)
    for row, v in cells:
        place = builder.add(builder.mul(out_stride, ir.Constant(I64, row)), ir.Constant(I64, v * LANES))
        total = builder.fadd(builder.load(sums[(row, v), 0]), builder.load(sums[(row, v), 1]))
        store_f32(builder, offset(builder, out, place, 4), total)


def _constant(value: float) -> Any:
    return ir.Constant(VF32, [value] * LANES)


def _exp(builder: Any, x: Any) -> Any:
    """Emit e**x for x <= 0, within 2 ulp (Cephes' expf): 0 if x is below SMALLEST_EXPONENT, NaN if x is NaN."""
    small = builder.fcmp_ordered("<", x, _constant(SMALLEST_EXPONENT))
    x = builder.select(small, _constant(SMALLEST_EXPONENT), x)
    rint = cgutils.get_or_insert_function(builder.module, ir.FunctionType(VF32, [VF32]), f"llvm.rint.v{LANES}f32")
    n = builder.call(rint, [builder.fmul(x, _constant(1.44269504))])
    r = fma(builder, n, _constant(-0.693359375), x)
    r = fma(builder, n, _constant(2.12194440e-4), r)
    p = _constant(1.9875691500e-4)
    for term in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = fma(builder, p, r, _constant(term))
    value = builder.fadd(fma(builder, p, builder.fmul(r, r), r), _constant(1.0))
    exponent = builder.add(builder.fptosi(n, VI32), ir.Constant(VI32, [127] * LANES))
    power = builder.bitcast(builder.shl(exponent, ir.Constant(VI32, [23] * LANES)), VF32)
    return builder.select(small, _constant(0.0), builder.fmul(value, power))


@emitted(types.none(types.int64, types.int64, types.float32))
def softmax(builder: Any, scores: Any, length: Any, scale: Any) -> None:
    """Emit code that replaces the first ``length`` scores with the softmax of ``scale`` * score. ``scale`` is above 0.

    The code processes STEP floats at a time, and so overwrites up to STEP - 1 floats after the last score.
    """
    whole = builder.and_(builder.add(length, ir.Constant(I64, STEP - 1)), ir.Constant(I64, -STEP))
    with cgutils.for_range_slice(builder, length, whole, ir.Constant(I64, 1), I64) as (index, _):
        store_f32(builder, offset(builder, scores, index, 4), ir.Constant(F32, float("-inf")))
    largest = splat(builder, _largest(builder, scores, whole))
    wide_scale = splat(builder, scale)
    sums = [variable(builder, _constant(0.0)) for _ in range(2)]
    for place, half in _steps(builder, scores, whole):
        score = load_f32(builder, place, "float32", LANES)
        weight = _exp(builder, builder.fmul(builder.fsub(score, largest), wide_scale))
        store_f32(builder, place, weight)
        builder.store(builder.fadd(builder.load(sums[half]), weight), sums[half])
    total = sum_lanes(builder, builder.fadd(builder.load(sums[0]), builder.load(sums[1])))
    inverse = splat(builder, builder.fdiv(ir.Constant(F32, 1.0), total))
    for place, _ in _steps(builder, scores, whole):
        store_f32(builder, place, builder.fmul(load_f32(builder, place, "float32", LANES), inverse))


def _steps(builder: Any, start: Any, whole: Any) -> Any:
    """Emit a loop over ``whole`` floats, two vectors per iteration. Yields each vector's address and index, 0 or 1."""
    with cgutils.for_range_slice(builder, ir.Constant(I64, 0), whole, ir.Constant(I64, STEP), I64) as (index, _):
        for half in range(2):
            yield offset(builder, start, builder.add(index, ir.Constant(I64, half * LANES)), 4), half


def _largest(builder: Any, scores: Any, whole: Any) -> Any:
    best = [variable(builder, _constant(float("-inf"))) for _ in range(2)]
    for place, half in _steps(builder, scores, whole):
        builder.store(
            _larger(builder, load_f32(builder, place, "float32", LANES), builder.load(best[half])), best[half]
        )
    vector = _larger(builder, builder.load(best[0]), builder.load(best[1]))
    lanes = [builder.extract_element(vector, ir.Constant(I32, lane)) for lane in range(LANES)]
    largest = lanes[0]
    for lane in lanes[1:]:
        largest = _larger(builder, lane, largest)
    return largest


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)
