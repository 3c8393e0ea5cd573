"""Vector code of the CPU attention kernel: scores of one KV block, and the weighted sum of its values."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from loraserve.kernels.vector_ir import I64, LANES, VF32, fma, load_f32, offset, splat, store_f32, variable


def make_score_block(tokens: int, positions: int) -> Any:
    """Intrinsic score(q, q_stride, keys, dim, out, out_stride): out[t, p] = q[t] . keys[:, p] for one KV block.

    ``keys`` float32 [dim, positions], so that a vector holds neighbouring positions and no sum over lanes is needed.
    Even and odd dimensions are summed apart, then added.
    """
    vectors = positions // LANES

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        q, q_stride, keys, dim, out, out_stride = arguments
        zero = ir.Constant(VF32, [0.0] * LANES)
        cells = [(t, v) for t in range(tokens) for v in range(vectors)]
        sums = {(cell, odd): variable(builder, zero) for cell in cells for odd in range(2)}

        def add_dimension(index: Any, odd: int) -> None:
            row = offset(builder, keys, index, 4 * positions)
            loaded = [
                load_f32(builder, builder.add(row, ir.Constant(I64, 4 * LANES * v)), "float32", LANES)
                for v in range(vectors)
            ]
            for t in range(tokens):
                at = builder.add(builder.mul(q_stride, ir.Constant(I64, t)), index)
                factor = splat(builder, load_f32(builder, offset(builder, q, at, 4), "float32", 1))
                for v in range(vectors):
                    slot = sums[(t, v), odd]
                    builder.store(fma(builder, factor, loaded[v], builder.load(slot)), slot)

        even = builder.and_(dim, ir.Constant(I64, -2))
        with cgutils.for_range_slice(builder, ir.Constant(I64, 0), even, ir.Constant(I64, 2), I64) as (index, _):
            add_dimension(index, 0)
            add_dimension(builder.add(index, ir.Constant(I64, 1)), 1)
        with cgutils.for_range_slice(builder, even, dim, ir.Constant(I64, 1), I64) as (index, _):
            add_dimension(index, 0)
        for t, v in cells:
            place = builder.add(builder.mul(out_stride, ir.Constant(I64, t)), ir.Constant(I64, v * LANES))
            total = builder.fadd(builder.load(sums[(t, v), 0]), builder.load(sums[(t, v), 1]))
            store_f32(builder, offset(builder, out, place, 4), total)
        return context.get_dummy_value()

    def score(typingctx: Any, q: Any, q_stride: Any, keys: Any, dim: Any, out: Any, out_stride: Any) -> Any:
        return types.none(*([types.int64] * 6)), codegen

    return intrinsic(score)


def make_mix_block(tokens: int, vectors: int) -> Any:
    """Intrinsic mix(y, y_stride, w, w_stride, values, stride, count): y[t] += sum over p < count of w[t, p] values[p].

    Works on ``vectors`` vectors of a row, held in registers while positions are added one after the other.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        y, y_stride, w, w_stride, values, stride, count = arguments
        cells = [(t, v) for t in range(tokens) for v in range(vectors)]
        places = {}
        for t, v in cells:
            at = builder.add(builder.mul(y_stride, ir.Constant(I64, t)), ir.Constant(I64, v * LANES))
            places[t, v] = offset(builder, y, at, 4)
        sums = {cell: variable(builder, load_f32(builder, places[cell], "float32", LANES)) for cell in cells}
        with cgutils.for_range_slice(builder, ir.Constant(I64, 0), count, ir.Constant(I64, 1), I64) as (index, _):
            row = offset(builder, values, builder.mul(stride, index), 4)
            loaded = [
                load_f32(builder, builder.add(row, ir.Constant(I64, 4 * LANES * v)), "float32", LANES)
                for v in range(vectors)
            ]
            for t in range(tokens):
                at = builder.add(builder.mul(w_stride, ir.Constant(I64, t)), index)
                factor = splat(builder, load_f32(builder, offset(builder, w, at, 4), "float32", 1))
                for v in range(vectors):
                    builder.store(fma(builder, factor, loaded[v], builder.load(sums[t, v])), sums[t, v])
        for cell in cells:
            store_f32(builder, places[cell], builder.load(sums[cell]))
        return context.get_dummy_value()

    def mix(typingctx: Any, y: Any, y_stride: Any, w: Any, w_stride: Any, values: Any, stride: Any, count: Any) -> Any:
        return types.none(*([types.int64] * 7)), codegen

    return intrinsic(mix)
