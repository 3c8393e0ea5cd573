"""Fused elementwise operations on the CPU: RMS norm with residual, rotary embedding, SiLU gate.

Each row is computed independently and in one fixed order. A token's values therefore have the same bits in any batch
and with any number of threads.
"""

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types

from loraserve.kernels.cpu.compiled import Kernel, emitted, inlined
from loraserve.kernels.cpu.operands import (
    OperandBlock,
    assert_dense,
    floats,
    fractions,
    int64s,
    integers,
    reader,
    take_part,
)
from loraserve.kernels.cpu.threads import run
from loraserve.kernels.cpu.vector_code import F32, I32, make_dot_block

SHARED_ELEMENTS = 20_000
"""Above this many elements a second thread saves more time than starting it costs."""
PART_ROWS = 8
"""Number of rows in one part of a call."""


class NormCall(OperandBlock):
    """Operands of ``_norm``. The address ``delta`` is 0 if nothing is added to x."""

    __slots__ = ()
    _fields_ = (*integers("x", "delta", "weight", "out", "tokens", "width"), *fractions("eps"))


class RotateCall(OperandBlock):
    """Operands of ``_rotate``. The addresses ``q_weight`` and ``k_weight`` are 0 if heads are not normalised."""

    __slots__ = ()
    _fields_ = (
        *integers("qkv", "positions", "cos", "sin", "q_weight", "k_weight", "q", "tokens", "heads", "kv_heads", "dim"),
        *fractions("eps"),
    )


class SiluMulCall(OperandBlock):
    __slots__ = ()
    _fields_ = integers("gate_up", "out", "tokens", "width")


_norm_operands, _rotate_operands, _silu_mul_operands = reader(NormCall), reader(RotateCall), reader(SiluMulCall)
_dot = make_dot_block(1, 1, "float32")


@emitted(types.float32(types.float32))
def _power_of_two(builder: Any, exponent: Any) -> Any:
    """Emit 2**exponent for a float32 ``exponent`` that is an integer between -126 and 127."""
    biased = builder.add(builder.fptosi(exponent, I32), ir.Constant(I32, 127))
    return builder.bitcast(builder.shl(biased, ir.Constant(I32, 23)), F32)


@inlined
def _exp(x):  # type: ignore[no-untyped-def]
    """Return e**max(x, -87) for x <= 0, within 2 ulp (Cephes' expf). Scalar and vector code give the same bits."""
    x = max(x, np.float32(-87.0))
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = (x - n * np.float32(0.693359375)) - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    value = p * (r * r) + r + np.float32(1.0)
    return value * _power_of_two(n)


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
    weight_row = _row(weight, 0, width)
    for i in range(width):
        out_row[i] = x_row[i] * inverse * weight_row[i]


def _norm(operands):  # type: ignore[no-untyped-def]
    o = _norm_operands(operands)
    start = take_part(operands) * PART_ROWS
    while start < o.tokens:
        for t in range(start, min(start + PART_ROWS, o.tokens)):
            _norm_row(o.x, o.delta, o.weight, o.eps, o.out, t, o.width)
        start = take_part(operands) * PART_ROWS


@inlined
def _rotate_head(source, target, weight, eps, cos_row, sin_row, dim):  # type: ignore[no-untyped-def]
    half = dim // 2
    x = _row(source, 0, dim)
    low, high = _row(target, 0, half), _row(target + half * 4, 0, half)
    if weight != 0:
        inverse = _inverse_rms(source, dim, eps)
        weight_row = _row(weight, 0, dim)
        for i in range(dim):
            x[i] = x[i] * inverse * weight_row[i]
    for i in range(half):
        a, b = x[i], x[half + i]
        low[i] = a * cos_row[i] - b * sin_row[i]
        high[i] = b * cos_row[i] + a * sin_row[i]


def _rotate(operands):  # type: ignore[no-untyped-def]
    o = _rotate_operands(operands)
    heads, kv_heads, dim = o.heads, o.kv_heads, o.dim
    row_bytes = (heads + 2 * kv_heads) * dim * 4
    position = int64s(o.positions, o.tokens)
    start = take_part(operands) * PART_ROWS
    while start < o.tokens:
        for t in range(start, min(start + PART_ROWS, o.tokens)):
            cos_row, sin_row = _row(o.cos, position[t], dim // 2), _row(o.sin, position[t], dim // 2)
            for head in range(heads + kv_heads):
                source = o.qkv + t * row_bytes + head * dim * 4
                target = o.q + (t * heads + head) * dim * 4 if head < heads else source
                weight = o.q_weight if head < heads else o.k_weight
                _rotate_head(source, target, weight, o.eps, cos_row, sin_row, dim)
        start = take_part(operands) * PART_ROWS


def _silu_mul(operands):  # type: ignore[no-untyped-def]
    o = _silu_mul_operands(operands)
    width = o.width
    one = np.float32(1.0)
    start = take_part(operands) * PART_ROWS
    while start < o.tokens:
        for t in range(start, min(start + PART_ROWS, o.tokens)):
            gate, up = _row(o.gate_up, 2 * t, width), _row(o.gate_up, 2 * t + 1, width)
            out_row = _row(o.out, t, width)
            for i in range(width):
                g = gate[i]
                e = _exp(-abs(g))
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
    """Add ``delta``, if given, to ``x``. Then write x / rms(x) * weight to ``out`` and return ``out``."""
    tokens, width = x.shape
    assert_dense(x, (tokens, width))
    assert_dense(weight, (width,))
    assert_dense(out, (tokens, width))
    if delta is not None:
        assert_dense(delta, (tokens, width))
    call = NormCall(
        x=x.data_ptr(), delta=0 if delta is None else delta.data_ptr(), weight=weight.data_ptr(), out=out.data_ptr(),
        tokens=tokens, width=width, eps=eps,
    )  # fmt: skip
    run(NORM, call, shared=tokens * width > SHARED_ELEMENTS)
    return out


def rotate(
    qkv: torch.Tensor,  # [tokens, (heads + 2 * kv_heads) * dim] float32; its keys are changed in place
    positions: torch.Tensor,  # [tokens] int64
    cos: torch.Tensor,  # [positions, dim / 2] float32
    sin: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | None,  # weights [dim] of the norms of query and key heads
    eps: float,
    q: torch.Tensor,  # [tokens, heads, dim] float32, written
    kv_heads: int,
) -> None:
    """Write rotated queries to ``q`` and rotate keys in place. With ``norms``, first apply an RMS norm to each head."""
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
    q_weight, k_weight = (weight.data_ptr() for weight in norms) if norms else (0, 0)
    call = RotateCall(
        qkv=qkv.data_ptr(), positions=positions.data_ptr(), cos=cos.data_ptr(), sin=sin.data_ptr(),
        q_weight=q_weight, k_weight=k_weight, q=q.data_ptr(),
        tokens=tokens, heads=heads, kv_heads=kv_heads, dim=dim, eps=eps,
    )  # fmt: skip
    run(ROTATE, call, shared=qkv.numel() > SHARED_ELEMENTS)


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write silu(gate_up[:, :width]) * gate_up[:, width:] to float32 ``out`` [tokens, width], and return ``out``."""
    tokens, width = out.shape
    assert_dense(out, (tokens, width))
    assert_dense(gate_up, (tokens, 2 * width))
    call = SiluMulCall(gate_up=gate_up.data_ptr(), out=out.data_ptr(), tokens=tokens, width=width)
    run(SILU_MUL, call, shared=out.numel() > SHARED_ELEMENTS)
    return out


def warm_up() -> None:
    """Compile the kernels of this module or load them from the disk cache."""
    for kernel in (NORM, ROTATE, SILU_MUL):
        kernel.warm_up()
