"""Fused elementwise operations on a CUDA GPU: RMS norm with residual, rotary embedding, SiLU gate.

Activations have the dtype of the weights, and sums are float32. A token's values do not depend on the other tokens of
its step.
"""

import torch
import triton
import triton.language as tl

SILU_BLOCK = 1024


@triton.jit
def _norm(x, delta, weight, out, eps, width, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    lane = tl.arange(0, BLOCK)
    mask = lane < width
    value = tl.load(x + row + lane, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(delta + row + lane, mask=mask, other=0.0).to(tl.float32)
        tl.store(x + row + lane, value.to(x.dtype.element_ty), mask=mask)
    inverse = 1.0 / tl.sqrt(tl.sum(value * value, 0) / width + eps)
    scaled = value * inverse * tl.load(weight + lane, mask=mask, other=0.0)
    tl.store(out + row + lane, scaled.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _rotate(
    qkv, q, keys, values, positions, kv_slot, cos, sin, q_weight, k_weight, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """Process one head of one token: rotate a query to ``q`` or a key to ``keys``, or copy a value to ``values``."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    source = qkv + (token * (HEADS + 2 * KV_HEADS) + head) * DIM
    half = tl.arange(0, BLOCK)
    mask = half < DIM // 2
    low = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(source + DIM // 2 + half, mask=mask, other=0.0).to(tl.float32)
    slot = tl.load(kv_slot + token).to(tl.int64)
    if head < HEADS + KV_HEADS:
        if NORMED:
            weight = q_weight if head < HEADS else k_weight
            inverse = 1.0 / tl.sqrt((tl.sum(low * low, 0) + tl.sum(high * high, 0)) / DIM + eps)
            low *= inverse * tl.load(weight + half, mask=mask, other=0.0)
            high *= inverse * tl.load(weight + DIM // 2 + half, mask=mask, other=0.0)
        angle = tl.load(positions + token).to(tl.int64) * (DIM // 2) + half
        c = tl.load(cos + angle, mask=mask, other=0.0)
        s = tl.load(sin + angle, mask=mask, other=0.0)
        rotated = low * c - high * s
        high = high * c + low * s
        low = rotated
    store_mask = mask
    target = q + (token * HEADS + head) * DIM
    if head >= HEADS:
        store_mask = mask & (slot >= 0)
        target = keys + (slot * KV_HEADS + head - HEADS) * DIM
        if head >= HEADS + KV_HEADS:
            target = values + (slot * KV_HEADS + head - HEADS - KV_HEADS) * DIM
    tl.store(target + half, low.to(q.dtype.element_ty), mask=store_mask)
    tl.store(target + DIM // 2 + half, high.to(q.dtype.element_ty), mask=store_mask)


@triton.jit
def _silu_mul(gate_up, out, width, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = lane < width
    gate = tl.load(gate_up + token * 2 * width + lane, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * width + width + lane, mask=mask, other=0.0).to(tl.float32)
    # The exponent is at most 0, so exp cannot overflow.
    e = tl.exp(-tl.abs(gate))
    sigmoid = tl.where(gate >= 0, 1.0, e) / (1.0 + e)
    tl.store(out + token * width + lane, (gate * sigmoid * up).to(out.dtype.element_ty), mask=mask)


def add_rms_norm(
    x: torch.Tensor,  # [tokens, width], changed in place
    delta: torch.Tensor | None,  # [tokens, width]
    weight: torch.Tensor,  # [width] float32
    eps: float,
    out: torch.Tensor,  # [tokens, width]
) -> torch.Tensor:
    """Add ``delta``, if given, to ``x``. Then write x / rms(x) * weight to ``out`` and return ``out``."""
    tokens, width = x.shape
    for tensor in (x, out) if delta is None else (x, out, delta):
        assert tensor.shape == x.shape, (tensor.shape, x.shape)
        assert tensor.is_contiguous(), tensor.stride()
    if tokens:
        _norm[(tokens,)](
            x=x, delta=x if delta is None else delta, weight=weight, out=out, eps=eps, width=width,
            ADD=delta is not None, BLOCK=triton.next_power_of_2(width),
        )  # fmt: skip
    return out


def rotate_and_store(
    qkv: torch.Tensor,  # [tokens, (heads + 2 * kv_heads) * dim]
    q: torch.Tensor,  # [tokens, heads, dim], written
    keys: torch.Tensor,  # [blocks, block_tokens, kv_heads, dim], written at ``kv_slot``
    values: torch.Tensor,
    positions: torch.Tensor,  # [tokens] int32
    kv_slot: torch.Tensor,  # [tokens] int32: block * block_tokens + offset; negative if not to be stored
    cos: torch.Tensor,  # [positions, dim / 2] float32
    sin: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | None,  # float32 weights [dim] of the norms of query and key heads
    eps: float,
) -> None:
    """Write rotated queries to ``q``, rotated keys and plain values to the KV cache. ``norms`` are applied first."""
    tokens, heads, dim = q.shape
    kv_heads = keys.shape[2]
    assert qkv.shape == (tokens, (heads + 2 * kv_heads) * dim), (qkv.shape, q.shape, keys.shape)
    for tensor in (qkv, q, keys, values, positions, kv_slot, cos, sin):
        assert tensor.is_contiguous(), tensor.stride()
    if tokens == 0:
        return
    q_weight, k_weight = norms or (cos, cos)
    _rotate[(tokens, heads + 2 * kv_heads)](
        qkv=qkv, q=q, keys=keys, values=values, positions=positions, kv_slot=kv_slot, cos=cos, sin=sin,
        q_weight=q_weight, k_weight=k_weight, eps=eps, HEADS=heads, KV_HEADS=kv_heads, DIM=dim,
        BLOCK=triton.next_power_of_2(dim // 2), NORMED=norms is not None, num_warps=1,
    )  # fmt: skip


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write silu(gate_up[:, :width]) * gate_up[:, width:] to ``out`` [tokens, width] and return ``out``."""
    tokens, width = out.shape
    assert gate_up.shape == (tokens, 2 * width), (gate_up.shape, out.shape)
    assert gate_up.is_contiguous(), gate_up.stride()
    assert out.is_contiguous(), out.stride()
    if tokens:
        blocks = triton.cdiv(width, SILU_BLOCK)
        _silu_mul[(tokens, blocks)](gate_up=gate_up, out=out, width=width, BLOCK=SILU_BLOCK)
    return out
