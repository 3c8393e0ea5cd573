"""Generates the vector code of the CPU kernels, with a fixed order of summation.

In loops that numba compiles, LLVM chooses the order of a reduction. The intrinsics made here fix the order, so a
token's result has the same bits in any batch. Addresses are int64, so kernels can index raw memory of any dtype. The
README of ``loraserve.kernels`` explains how the code is generated and how to read and debug it.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils

from loraserve.kernels.cpu.compiled import I64, emitted, inlined, no_result

LANES = 8
STEP = 2 * LANES
"""Elements per iteration of a dot product. Two independent vector sums hide the multiply-add latency."""

LINE_BYTES = 64
STREAM_TOKENS = 4
"""A kernel prefetches weights for up to this many tokens. For more, arithmetic is the bottleneck."""
AHEAD_BLOCKS = 1
"""Number of row blocks that weights are prefetched ahead."""

F32 = ir.FloatType()
I16 = ir.IntType(16)
I32 = ir.IntType(32)
VF32 = ir.VectorType(F32, LANES)

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_RAW = {"float32": F32, "bfloat16": I16, "float16": ir.HalfType()}


def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """Emit a fused multiply-add a * b + c of scalars or vectors."""
    kind = a.type
    name = f"llvm.fma.v{kind.count}f32" if isinstance(kind, ir.VectorType) else "llvm.fma.f32"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * 3), name)
    return builder.call(function, [a, b, c])


def load_f32(builder: Any, address: Any, dtype: str, lanes: int) -> Any:
    """Emit a load of ``lanes`` elements of ``dtype`` at an int64 address, widened to float32."""
    raw = _RAW[dtype] if lanes == 1 else ir.VectorType(_RAW[dtype], lanes)
    value = builder.load(builder.inttoptr(address, raw.as_pointer()), align=ELEMENT_BYTES[dtype])
    wide = F32 if lanes == 1 else ir.VectorType(F32, lanes)
    if dtype == "float32":
        return value
    if dtype == "float16":
        return builder.fpext(value, wide)
    bits = I32 if lanes == 1 else ir.VectorType(I32, lanes)
    shift = ir.Constant(bits, 16) if lanes == 1 else ir.Constant(bits, [16] * lanes)
    return builder.bitcast(builder.shl(builder.zext(value, bits), shift), wide)


def prefetch(builder: Any, address: Any, lines: int, near: bool) -> None:
    """Emit prefetches of ``lines`` cache lines, into the L1 cache if ``near``, else into L2.

    In measurements, L1 was faster for weights, which are read as a stream. L2 was faster for keys and values.
    """
    pointer = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
    function = builder.module.declare_intrinsic("llvm.prefetch", (pointer,), kind)
    for line in range(lines):
        place = builder.inttoptr(builder.add(address, ir.Constant(I64, LINE_BYTES * line)), pointer)
        builder.call(function, [place, ir.Constant(I32, 0), ir.Constant(I32, 3 if near else 2), ir.Constant(I32, 1)])


def _prefetch_next(builder: Any, block: Any, stride: Any, rows: int, index: Any, step: int, element_bytes: int) -> None:
    """Emit prefetches of the next ``rows`` rows. Each iteration of the caller's loop prefetches as much as it reads."""
    ahead = offset(builder, block, builder.mul(stride, ir.Constant(I64, AHEAD_BLOCKS * rows)), element_bytes)
    lines = -(-step * rows * element_bytes // LINE_BYTES)
    prefetch(builder, offset(builder, ahead, index, rows * element_bytes), lines, near=True)


def store_f32(builder: Any, address: Any, value: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=4)


def splat(builder: Any, value: Any, lanes: int = LANES) -> Any:
    """Emit a vector with all lanes equal to a scalar."""
    undefined = ir.Constant(ir.VectorType(F32, lanes), ir.Undefined)
    one = builder.insert_element(undefined, value, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def sum_lanes(builder: Any, vector: Any) -> Any:
    """Emit the sum of all lanes, computed by pairwise addition."""
    width = LANES
    while width > 1:
        width //= 2
        mask = ir.VectorType(I32, width)
        undefined = ir.Constant(vector.type, ir.Undefined)
        low = builder.shuffle_vector(vector, undefined, ir.Constant(mask, list(range(width))))
        high = builder.shuffle_vector(vector, undefined, ir.Constant(mask, list(range(width, 2 * width))))
        vector = builder.fadd(low, high)
    return builder.extract_element(vector, ir.Constant(I32, 0))


def offset(builder: Any, address: Any, index: Any, element_bytes: int) -> Any:
    """Emit the address of element ``index`` of the array at ``address``."""
    return builder.add(address, builder.mul(index, ir.Constant(I64, element_bytes)))


def most_sums() -> int:
    """Return how many vector sums a block may keep in registers: half of them. The rest is for loaded values."""
    return 16 if binding.get_host_cpu_features().get("avx512vl") else 8


def block_of_size(sizes: Sequence[int], make_block: Callable[[int], Any]) -> Any:
    """Return the function block(size, operands), which calls the intrinsic ``make_block(size)`` for one of ``sizes``.

    ``operands`` is a tuple. A kernel knows the size only at run time, so the function contains one branch per size.
    """
    first = make_block(sizes[0])
    if len(sizes) == 1:

        @inlined
        def only(size, operands):  # type: ignore[no-untyped-def]
            first(*operands)

        return only
    largest, smaller = sizes[0], block_of_size(sizes[1:], make_block)

    @inlined
    def block(size, operands):  # type: ignore[no-untyped-def]
        if size == largest:
            first(*operands)
        else:
            smaller(size, operands)

    return block


def make_dot_block(tokens: int, rows: int, dtype: str) -> Any:
    """Return the intrinsic dot(x, x_stride, a, a_stride, k, out, out_stride).

    It computes out[t, r] = x[t] . a[r] for ``tokens`` rows of ``x`` (float32) and ``rows`` rows of ``a`` (``dtype``).
    Strides are in elements and ``k`` is the row length. The order of a sum does not depend on the block size.
    """
    rows_at_once = min(rows, max(1, most_sums() // (2 * tokens)))

    @emitted(no_result(7))
    def dot(builder: Any, x: Any, x_stride: Any, a: Any, a_stride: Any, k: Any, out: Any, out_stride: Any) -> None:
        x_rows = [offset(builder, x, builder.mul(x_stride, ir.Constant(I64, t)), 4) for t in range(tokens)]
        for first in range(0, rows, rows_at_once):
            a_rows = [
                offset(builder, a, builder.mul(a_stride, ir.Constant(I64, r)), ELEMENT_BYTES[dtype])
                for r in range(first, min(first + rows_at_once, rows))
            ]
            ahead = a_stride if tokens <= STREAM_TOKENS and rows > 1 else None
            totals = _dot_sums(builder, x_rows, a_rows, k, dtype, ahead)
            for (t, r), total in totals.items():
                place = builder.add(builder.mul(out_stride, ir.Constant(I64, t)), ir.Constant(I64, first + r))
                store_f32(builder, offset(builder, out, place, 4), total)

    return dot


def _dot_sums(
    builder: Any, x_rows: list[Any], a_rows: list[Any], k: Any, dtype: str, stride: Any
) -> dict[tuple[int, int], Any]:
    """Emit the dot products of all pairs of rows. Each sum adds whole vectors, then their lanes, then the tail.

    ``stride`` is the distance between ``a_rows`` in elements, or None to omit prefetching.
    """
    zero = ir.Constant(VF32, [0.0] * LANES)
    pairs = [(t, r) for t in range(len(x_rows)) for r in range(len(a_rows))]
    sums = {(pair, half): variable(builder, zero) for pair in pairs for half in range(2)}
    whole = builder.and_(k, ir.Constant(I64, -STEP))
    with cgutils.for_range_slice(builder, ir.Constant(I64, 0), whole, ir.Constant(I64, STEP), I64) as (index, _):
        if stride is not None:
            _prefetch_next(builder, a_rows[0], stride, len(a_rows), index, STEP, ELEMENT_BYTES[dtype])
        for half in range(2):
            at = builder.add(index, ir.Constant(I64, half * LANES))
            xs = [load_f32(builder, offset(builder, row, at, 4), "float32", LANES) for row in x_rows]
            for r, a_row in enumerate(a_rows):
                weights = load_f32(builder, offset(builder, a_row, at, ELEMENT_BYTES[dtype]), dtype, LANES)
                for t in range(len(x_rows)):
                    slot = sums[(t, r), half]
                    builder.store(fma(builder, xs[t], weights, builder.load(slot)), slot)
    totals = {}
    for t, r in pairs:
        both = builder.fadd(builder.load(sums[(t, r), 0]), builder.load(sums[(t, r), 1]))
        total = variable(builder, ir.Constant(F32, 0.0))
        builder.store(sum_lanes(builder, both), total)
        with cgutils.for_range_slice(builder, whole, k, ir.Constant(I64, 1), I64) as (index, _):
            left = load_f32(builder, offset(builder, x_rows[t], index, 4), "float32", 1)
            right = load_f32(builder, offset(builder, a_rows[r], index, ELEMENT_BYTES[dtype]), dtype, 1)
            builder.store(fma(builder, left, right, builder.load(total)), total)
        totals[t, r] = builder.load(total)
    return totals


def variable(builder: Any, value: Any) -> Any:
    """Emit a mutable variable with an initial value, and return its pointer. The allocation is hoisted out of loops."""
    slot = cgutils.alloca_once(builder, value.type)
    builder.store(value, slot)
    return slot


def make_axpy_block(tokens: int, rows: int, dtype: str) -> Any:
    """Return the intrinsic axpy(y, y_stride, h, h_stride, b, b_stride, n).

    It computes y[t] += sum over r of h[t, r] * b[r]. ``y`` and ``h`` are float32, ``b`` is ``dtype``. Strides are in
    elements; ``n`` is the row length. FMAs add the rows of ``b`` in order, so the block size does not change bits.
    """
    element_bytes = ELEMENT_BYTES[dtype]

    @emitted(no_result(7))
    def axpy(builder: Any, y: Any, y_stride: Any, h: Any, h_stride: Any, b: Any, b_stride: Any, n: Any) -> None:
        y_rows = [offset(builder, y, builder.mul(y_stride, ir.Constant(I64, t)), 4) for t in range(tokens)]
        b_rows = [offset(builder, b, builder.mul(b_stride, ir.Constant(I64, r)), element_bytes) for r in range(rows)]
        factors = {}
        for t in range(tokens):
            for r in range(rows):
                place = builder.add(builder.mul(h_stride, ir.Constant(I64, t)), ir.Constant(I64, r))
                factors[t, r] = load_f32(builder, offset(builder, h, place, 4), "float32", 1)
        wide = {key: splat(builder, value) for key, value in factors.items()}

        def add_at(index: Any, lanes: int, table: Any) -> None:
            weights = [load_f32(builder, offset(builder, row, index, element_bytes), dtype, lanes) for row in b_rows]
            for t, y_row in enumerate(y_rows):
                address = offset(builder, y_row, index, 4)
                total = load_f32(builder, address, "float32", lanes)
                for r in range(rows):
                    total = fma(builder, table[t, r], weights[r], total)
                store_f32(builder, address, total)

        whole = builder.and_(n, ir.Constant(I64, -LANES))
        with cgutils.for_range_slice(builder, ir.Constant(I64, 0), whole, ir.Constant(I64, LANES), I64) as (index, _):
            if rows > 1:
                _prefetch_next(builder, b, b_stride, rows, index, LANES, element_bytes)
            add_at(index, LANES, wide)
        with cgutils.for_range_slice(builder, whole, n, ir.Constant(I64, 1), I64) as (index, _):
            add_at(index, 1, factors)

    return axpy


def make_mix_block(tokens: int, vectors: int, dtype: str) -> Any:
    """Return the intrinsic mix(y, y_stride, w, w_stride, values, stride, count, ahead).

    It computes y[t] += sum over p of w[t, p] * values[p] for ``tokens`` rows. ``y`` and ``w`` are float32, ``values``
    are ``dtype``. Each row of ``y`` is ``vectors`` vectors long, held in registers. Rows of ``values`` are added in
    order, as in ``make_axpy_block``, so both give equal bits. It also prefetches the next call's values from ``ahead``.
    """
    at_once = min(vectors, max(1, most_sums() // tokens))

    @emitted(no_result(8))
    def mix(builder: Any, *operands: Any) -> None:
        for first in range(0, vectors, at_once):
            _mix_columns(builder, operands, tokens, range(first, min(first + at_once, vectors)), dtype)

    return mix


def _mix_columns(builder: Any, operands: Any, tokens: int, columns: range, dtype: str) -> None:
    y, y_stride, w, w_stride, values, stride, count, ahead = operands
    element_bytes = ELEMENT_BYTES[dtype]
    cells = [(t, v) for t in range(tokens) for v in columns]
    places = {}
    for t, v in cells:
        at = builder.add(builder.mul(y_stride, ir.Constant(I64, t)), ir.Constant(I64, v * LANES))
        places[t, v] = offset(builder, y, at, 4)
    sums = {cell: variable(builder, load_f32(builder, places[cell], "float32", LANES)) for cell in cells}
    with cgutils.for_range_slice(builder, ir.Constant(I64, 0), count, ir.Constant(I64, 1), I64) as (index, _):
        row = offset(builder, values, builder.mul(stride, index), element_bytes)
        later = offset(builder, ahead, builder.mul(stride, index), element_bytes)
        first = builder.add(later, ir.Constant(I64, columns.start * LANES * element_bytes))
        prefetch(builder, first, -(-len(columns) * LANES * element_bytes // LINE_BYTES), near=False)
        loaded = {
            v: load_f32(builder, builder.add(row, ir.Constant(I64, element_bytes * LANES * v)), dtype, LANES)
            for v in columns
        }
        for t in range(tokens):
            at = builder.add(builder.mul(w_stride, ir.Constant(I64, t)), index)
            factor = splat(builder, load_f32(builder, offset(builder, w, at, 4), "float32", 1))
            for v in columns:
                builder.store(fma(builder, factor, loaded[v], builder.load(sums[t, v])), sums[t, v])
    for cell in cells:
        store_f32(builder, places[cell], builder.load(sums[cell]))
