"""The small operations between the matrix products, each in one pass over memory on the CPU.

Rows are independent and every row is computed in one fixed order, so that a token's values have the same bits in any
batch and with any number of threads.
"""

from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.extending import intrinsic
from numba.np.numpy_support import carray

from loraserve.kernels.attention.cpu import _exp
from loraserve.kernels.dense import assert_dense
from loraserve.kernels.vector_ir import make_dot_block
from loraserve.kernels.workers import parts, run_parts

SHARE_WORK_ELEMENTS = 100_000
"""Elements below which waking another thread costs more than it brings."""

_dot = make_dot_block(1, 1, "float32")


def _pointer_of(typingctx: Any, address: Any) -> Any:
    """An int64 address as a pointer to float32: passing addresses costs a call far less than passing arrays."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    make_pointer: Any = types.CPointer
    return make_pointer(types.float32)(types.int64), codegen


_pointer: Any = intrinsic(_pointer_of)


@njit(cache=True, nogil=True, inline="always")
def _row(base, index, width):  # type: ignore[no-untyped-def]
    return carray(_pointer(base + index * width * 4), (width,), np.float32)


@njit(cache=True, nogil=True, inline="always")
def _inverse_rms(address, width, eps):  # type: ignore[no-untyped-def]
    total = np.empty(1, np.float32)
    _dot(address, 0, address, 0, width, total.ctypes.data, 0)
    return np.float32(1.0) / np.sqrt(total[0] / np.float32(width) + eps)


@njit(cache=True, nogil=True)
def _add_rms_norm_part(part, count, x, delta, weight, eps, out, tokens, width):  # type: ignore[no-untyped-def]
    scale_row = _row(weight, 0, width)
    for t in range(tokens * part // count, tokens * (part + 1) // count):
        x_row = _row(x, t, width)
        if delta != 0:
            delta_row = _row(delta, t, width)
            for i in range(width):
                x_row[i] += delta_row[i]
        inverse = _inverse_rms(x + t * width * 4, width, eps)
        out_row = _row(out, t, width)
        for i in range(width):
            out_row[i] = x_row[i] * inverse * scale_row[i]


@njit(cache=True, nogil=True)
def _rotate_part(  # type: ignore[no-untyped-def]
    part, count, qkv, positions, cos, sin, q_weight, k_weight, eps, q, tokens, heads, kv_heads, dim
):
    half = dim // 2
    row_bytes = (heads + 2 * kv_heads) * dim * 4
    for t in range(tokens * part // count, tokens * (part + 1) // count):
        cos_row = _row(cos, positions[t], half)
        sin_row = _row(sin, positions[t], half)
        for head in range(heads + kv_heads):
            source = qkv + t * row_bytes + head * dim * 4
            target = q + (t * heads + head) * dim * 4 if head < heads else source
            x = _row(source, 0, dim)
            low, high = _row(target, 0, half), _row(target + half * 4, 0, half)
            weight = q_weight if head < heads else k_weight
            if weight != 0:
                inverse = _inverse_rms(source, dim, eps)
                scale_row = _row(weight, 0, dim)
                for i in range(dim):
                    x[i] = x[i] * inverse * scale_row[i]
            for i in range(half):
                a, b = x[i], x[half + i]
                low[i] = a * cos_row[i] - b * sin_row[i]
                high[i] = b * cos_row[i] + a * sin_row[i]


# Python's division checks for zero, and the check keeps the loop scalar: eight times slower.
@njit(cache=True, nogil=True, error_model="numpy")
def _silu_mul_part(part, count, gate_up, out, tokens, width):  # type: ignore[no-untyped-def]
    one = np.float32(1.0)
    for t in range(tokens * part // count, tokens * (part + 1) // count):
        gate, up = _row(gate_up, 2 * t, width), _row(gate_up, 2 * t + 1, width)
        out_row = _row(out, t, width)
        for i in range(width):
            g = gate[i]
            e = _exp(-abs(g))
            out_row[i] = g * up[i] * ((one if g >= 0 else e) / (one + e))


def _share(elements: int) -> int:
    return parts() if elements > SHARE_WORK_ELEMENTS else 1


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
    arguments = (x.data_ptr(), address, weight.data_ptr(), np.float32(eps), out.data_ptr(), tokens, width)
    run_parts(_add_rms_norm_part, _share(tokens * width), arguments)
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
    arguments = (
        qkv.data_ptr(),
        positions.numpy(),
        cos.data_ptr(),
        sin.data_ptr(),
        norms[0].data_ptr() if norms else 0,
        norms[1].data_ptr() if norms else 0,
        np.float32(eps),
        q.data_ptr(),
        tokens,
        heads,
        kv_heads,
        dim,
    )
    run_parts(_rotate_part, _share(qkv.numel()), arguments)


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out[t] = silu(gate_up[t, :width]) * gate_up[t, width:], float32 [tokens, width]. Returns ``out``."""
    tokens, width = out.shape
    assert_dense(out, (tokens, width))
    assert_dense(gate_up, (tokens, 2 * width))
    run_parts(_silu_mul_part, _share(out.numel()), (gate_up.data_ptr(), out.data_ptr(), tokens, width))
    return out


def warm_up() -> None:
    """Compile, or load from the cache, everything that a step may call."""
    x = torch.zeros(1, 4)
    add_rms_norm(x, x.clone(), x[0], 1.0, torch.empty_like(x))
    positions, angles = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 2)
    rotate(torch.zeros(1, 12), positions, angles, angles, (x[0], x[0]), 1.0, torch.zeros(1, 1, 4), 1)
    silu_mul(torch.zeros(1, 8), x)
