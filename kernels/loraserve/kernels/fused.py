"""The small operations between the matrix products, each in one pass over memory on the CPU.

Rows are independent and every row is computed in one fixed order, so that a token's values have the same bits in any
batch and with any number of threads.
"""

import numpy as np
import torch

from loraserve.kernels.compiled import Kernel, inlined
from loraserve.kernels.dense import assert_dense
from loraserve.kernels.elementary import exp
from loraserve.kernels.memory import as_float, float_bits, floats, int64s, take_part
from loraserve.kernels.vector_ir import make_dot_block
from loraserve.kernels.workers import run

SHARE_WORK_ELEMENTS = 20_000
"""Elements from which a second thread brings more than calling it costs."""
PART_ROWS = 8
"""Rows that a thread takes at a time."""

_dot = make_dot_block(1, 1, "float32")


@inlined
def _row(base, index, width):  # type: ignore[no-untyped-def]
    return floats(base + index * width * 4, width)


@inlined
def _inverse_rms(address, width, eps):  # type: ignore[no-untyped-def]
    total = np.empty(1, np.float32)
    _dot(address, 0, address, 0, width, total.ctypes.data, 0)
    return np.float32(1.0) / np.sqrt(total[0] / np.float32(width) + eps)


@inlined
def _norm_row(x, delta, weight, eps, out, t, width):  # type: ignore[no-untyped-def]
    x_row = _row(x, t, width)
    if delta != 0:
        delta_row = _row(delta, t, width)
        for i in range(width):
            x_row[i] += delta_row[i]
    inverse = _inverse_rms(x + t * width * 4, width, eps)
    out_row = _row(out, t, width)
    scale_row = _row(weight, 0, width)
    for i in range(width):
        out_row[i] = x_row[i] * inverse * scale_row[i]


def _norm(operands):  # type: ignore[no-untyped-def]
    values = int64s(operands, 8)
    x, delta, weight, eps = values[1], values[2], values[3], as_float(values[4])
    out, tokens, width = values[5], values[6], values[7]
    start = take_part(operands) * PART_ROWS
    while start < tokens:
        for t in range(start, min(start + PART_ROWS, tokens)):
            _norm_row(x, delta, weight, eps, out, t, width)
        start = take_part(operands) * PART_ROWS


@inlined
def _rotate_head(source, target, weight, eps, cos_row, sin_row, dim):  # type: ignore[no-untyped-def]
    half = dim // 2
    x = _row(source, 0, dim)
    low, high = _row(target, 0, half), _row(target + half * 4, 0, half)
    if weight != 0:
        inverse = _inverse_rms(source, dim, eps)
        scale_row = _row(weight, 0, dim)
        for i in range(dim):
            x[i] = x[i] * inverse * scale_row[i]
    for i in range(half):
        a, b = x[i], x[half + i]
        low[i] = a * cos_row[i] - b * sin_row[i]
        high[i] = b * cos_row[i] + a * sin_row[i]


def _rotate(operands):  # type: ignore[no-untyped-def]
    values = int64s(operands, 13)
    qkv, positions, cos, sin = values[1], values[2], values[3], values[4]
    q_weight, k_weight, eps, q = values[5], values[6], as_float(values[7]), values[8]
    tokens, heads, kv_heads, dim = values[9], values[10], values[11], values[12]
    row_bytes = (heads + 2 * kv_heads) * dim * 4
    position = int64s(positions, tokens)
    start = take_part(operands) * PART_ROWS
    while start < tokens:
        for t in range(start, min(start + PART_ROWS, tokens)):
            cos_row, sin_row = _row(cos, position[t], dim // 2), _row(sin, position[t], dim // 2)
            for head in range(heads + kv_heads):
                source = qkv + t * row_bytes + head * dim * 4
                target = q + (t * heads + head) * dim * 4 if head < heads else source
                weight = q_weight if head < heads else k_weight
                _rotate_head(source, target, weight, eps, cos_row, sin_row, dim)
        start = take_part(operands) * PART_ROWS


def _silu_mul(operands):  # type: ignore[no-untyped-def]
    values = int64s(operands, 5)
    gate_up, out, tokens, width = values[1], values[2], values[3], values[4]
    one = np.float32(1.0)
    start = take_part(operands) * PART_ROWS
    while start < tokens:
        for t in range(start, min(start + PART_ROWS, tokens)):
            gate, up = _row(gate_up, 2 * t, width), _row(gate_up, 2 * t + 1, width)
            out_row = _row(out, t, width)
            for i in range(width):
                g = gate[i]
                e = exp(-abs(g))
                out_row[i] = g * up[i] * ((one if g >= 0 else e) / (one + e))
        start = take_part(operands) * PART_ROWS


NORM, ROTATE, SILU_MUL = Kernel(_norm), Kernel(_rotate), Kernel(_silu_mul)


def add_rms_norm(
    x: torch.Tensor,  # [tokens, width] float32, changed in place
    delta: torch.Tensor | None,  # [tokens, width] float32
    weight: torch.Tensor,  # [width] float32
    eps: float,
    out: torch.Tensor,  # [tokens, width] float32
) -> torch.Tensor:
    """x += delta; out = x / rms(x) * weight. Returns ``out``."""
    tokens, width = x.shape
    assert_dense(x, (tokens, width))
    assert_dense(weight, (width,))
    assert_dense(out, (tokens, width))
    if delta is not None:
        assert_dense(delta, (tokens, width))
    address = 0 if delta is None else delta.data_ptr()
    shared = tokens * width > SHARE_WORK_ELEMENTS
    bits = float_bits(eps)
    run(NORM, shared, x.data_ptr(), address, weight.data_ptr(), bits, out.data_ptr(), tokens, width)
    return out


def rotate(
    qkv: torch.Tensor,  # [tokens, (heads + 2 * kv_heads) * dim] float32; its keys are changed in place
    positions: torch.Tensor,  # [tokens] int64
    cos: torch.Tensor,  # [positions, dim / 2] float32
    sin: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | None,  # weights [dim] of the norms of each query and each key
    eps: float,
    q: torch.Tensor,  # [tokens, heads, dim] float32
    kv_heads: int,
) -> None:
    """Queries and keys, normed per head where the model does so, then rotated to their positions."""
    tokens, heads, dim = q.shape
    assert_dense(q, (tokens, heads, dim))
    assert_dense(qkv, (tokens, (heads + 2 * kv_heads) * dim))
    assert positions.shape == (tokens,), positions.shape
    assert positions.dtype == torch.int64, positions.dtype
    for table in (cos, sin):
        assert_dense(table, (table.shape[0], dim // 2))
    for weight in norms or ():
        assert_dense(weight, (dim,))
    assert positions.is_contiguous(), positions.stride()
    run(
        ROTATE,
        qkv.numel() > SHARE_WORK_ELEMENTS,
        qkv.data_ptr(),
        positions.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        norms[0].data_ptr() if norms else 0,
        norms[1].data_ptr() if norms else 0,
        float_bits(eps),
        q.data_ptr(),
        tokens,
        heads,
        kv_heads,
        dim,
    )


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out[t] = silu(gate_up[t, :width]) * gate_up[t, width:], float32 [tokens, width]. Returns ``out``."""
    tokens, width = out.shape
    assert_dense(out, (tokens, width))
    assert_dense(gate_up, (tokens, 2 * width))
    run(SILU_MUL, out.numel() > SHARE_WORK_ELEMENTS, gate_up.data_ptr(), out.data_ptr(), tokens, width)
    return out


def warm_up() -> None:
    """Compile, or load from the cache, everything that a step may call."""
    for kernel in (NORM, ROTATE, SILU_MUL):
        kernel.warm_up()
