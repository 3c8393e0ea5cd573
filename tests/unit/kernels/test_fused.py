"""Compares the fused operations with torch. Rows have the same bits alone, in a batch and on several threads."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from loraserve.kernels.fused import cpu as fused

WIDTHS = [64, 6, 106, 576]


def test_add_rms_norm() -> None:
    for width in WIDTHS:
        x, delta, weight = torch.randn(5, width), torch.randn(5, width), torch.randn(width)
        total = x + delta
        out = fused.add_rms_norm(x, delta, weight, 1e-5, torch.full_like(x, float("nan")))
        assert torch.equal(x, total)
        torch.testing.assert_close(out, functional.rms_norm(total, (width,), weight, 1e-5), rtol=1e-5, atol=1e-6)
        again = fused.add_rms_norm(x, None, weight, 1e-5, torch.empty_like(x))
        assert torch.equal(again, out)
        assert torch.equal(x, total)


def test_silu_mul() -> None:
    for width in WIDTHS:
        gate_up = torch.randn(7, 2 * width) * 20
        gate_up[0, :3] = torch.tensor([200.0, -200.0, 0.0])
        out = fused.silu_mul(gate_up, torch.full((7, width), float("nan")))
        exact = functional.silu(gate_up[:, :width].double()) * gate_up[:, width:].double()
        torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("normed", [False, True])
def test_rotate(normed: bool) -> None:
    heads, kv_heads, dim, tokens = 4, 2, 24, 9
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim)
    angles = torch.randn(30, dim // 2)
    positions = torch.randint(0, 30, (tokens,))
    norms = (torch.randn(dim), torch.randn(dim)) if normed else None
    rows = qkv.clone().view(tokens, -1, dim)
    if norms:
        rows[:, :heads] = functional.rms_norm(rows[:, :heads], (dim,), norms[0], 1e-6)
        rows[:, heads:-kv_heads] = functional.rms_norm(rows[:, heads:-kv_heads], (dim,), norms[1], 1e-6)
    cos, sin = (table[positions].repeat(1, 2)[:, None] for table in (angles.cos(), angles.sin()))
    low, high = rows.chunk(2, dim=-1)
    turned = rows * cos + torch.cat([-high, low], dim=-1) * sin

    q = torch.full((tokens, heads, dim), float("nan"))
    values = qkv.view(tokens, -1, dim)[:, -kv_heads:].clone()
    fused.rotate(qkv, positions, angles.cos(), angles.sin(), norms, 1e-6, q, kv_heads)
    torch.testing.assert_close(q, turned[:, :heads], rtol=1e-5, atol=1e-6)
    kept = qkv.view(tokens, -1, dim)
    torch.testing.assert_close(kept[:, heads:-kv_heads], turned[:, heads:-kv_heads], rtol=1e-5, atol=1e-6)
    assert torch.equal(kept[:, -kv_heads:], values)


def test_rows_have_the_same_bits_alone_and_on_threads(
    threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = torch.randn(70, 104), torch.randn(104)

    def all_of(rows: torch.Tensor) -> torch.Tensor:
        rows = rows.clone()
        normed = fused.add_rms_norm(rows, None, weight, 1e-5, torch.empty_like(rows))
        gated = fused.silu_mul(rows, torch.empty(len(rows), 52))
        q = torch.empty(len(rows), 2, 26)
        angles = torch.full((1, 13), 0.3)
        fused.rotate(rows, torch.zeros(len(rows), dtype=torch.int64), angles, angles, None, 1e-5, q, 1)
        return torch.cat([normed, gated, q.flatten(1), rows], dim=1)

    together = all_of(x)
    for t in (0, 8, 69):
        assert torch.equal(all_of(x[t : t + 1])[0], together[t])
    monkeypatch.setattr(fused, "SHARED_ELEMENTS", 0)
    threads(3)
    assert torch.equal(all_of(x), together)
