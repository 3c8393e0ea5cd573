"""Compares the fused GPU operations with float64, on a GPU if there is one, else in Triton's interpreter."""

import pytest
import torch
from torch.nn import functional

pytest.importorskip("triton", reason="the GPU kernels need triton")

from loraserve.kernels.fused.gpu import SILU_BLOCK, add_rms_norm, rotate_and_store, silu_mul

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Results are computed in float32 and rounded once: half a unit in the last place, and sums of float32."""
NAN = float("nan")
EPS = 1e-5
BLOCKS, BLOCK_TOKENS, POSITIONS = 3, 4, 30


def random(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def nans_like(tensor: torch.Tensor, *size: int) -> torch.Tensor:
    return torch.full(size or tensor.shape, NAN, dtype=tensor.dtype, device=DEVICE)


def assert_close(out: torch.Tensor, exact: torch.Tensor) -> None:
    tolerance = TOLERANCE[out.dtype]
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance * 1e-2)


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(x.double(), (x.shape[-1],), weight.double(), EPS)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("width", [1, 6, 64, 106])
def test_the_delta_is_added_before_the_norm(dtype: torch.dtype, width: int) -> None:
    x, delta, weight = random(3, width, dtype=dtype), random(3, width, dtype=dtype, seed=1), random(width, seed=2)
    total = x.double() + delta.double()
    out = nans_like(x)
    assert add_rms_norm(x, delta, weight, EPS, out) is out
    assert torch.equal(x, total.float().to(dtype)), "the stream keeps the sum"
    assert_close(out, norm(total, weight))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_without_a_delta_the_input_does_not_change(dtype: torch.dtype) -> None:
    x, weight = random(2, 72, dtype=dtype), random(72, seed=2)
    before = x.clone()
    assert_close(add_rms_norm(x, None, weight, EPS, nans_like(x)), norm(before, weight))
    assert torch.equal(x, before)


def test_rows_of_zeros_and_of_tiny_numbers_have_a_norm() -> None:
    x = torch.stack([torch.zeros(9), torch.full((9,), 1e-25)]).to(DEVICE)
    weight = torch.ones(9, device=DEVICE)
    assert_close(add_rms_norm(x, None, weight, EPS, nans_like(x)), norm(x, weight))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("width", [1, 53, SILU_BLOCK + 3])
def test_gates_open_and_close(dtype: torch.dtype, width: int) -> None:
    gate_up = random(2, 2 * width, dtype=dtype) * 4
    out = nans_like(gate_up, 2, width)
    assert silu_mul(gate_up, out) is out
    assert_close(out, functional.silu(gate_up[:, :width].double()) * gate_up[:, width:].double())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_extreme_gates_do_not_overflow(dtype: torch.dtype) -> None:
    gates = torch.tensor([6e4, -6e4, 200.0, -200.0, 90.0, -90.0, 0.0, -0.0], dtype=dtype)
    gate_up = torch.cat([gates, torch.ones(8, dtype=dtype)])[None].to(DEVICE)
    out = silu_mul(gate_up, nans_like(gate_up, 1, 8))
    # A closed gate gives less than float32 tells from zero, whatever is left of it.
    exact = functional.silu(gates.double().to(DEVICE))
    torch.testing.assert_close(out.double(), exact[None], rtol=TOLERANCE[dtype], atol=1e-30)


class Heads:
    """Tokens, and a cache full of NaN in which their keys and values are stored."""

    def __init__(self, dtype: torch.dtype, dim: int, tokens: int, normed: bool, seed: int = 0) -> None:
        self.heads, self.kv_heads, self.dim = 3, 2, dim
        self.qkv = random(tokens, (self.heads + 2 * self.kv_heads) * dim, dtype=dtype, seed=seed)
        angles = random(POSITIONS, dim // 2, seed=seed + 1)
        self.cos, self.sin = angles.cos(), angles.sin()
        generator = torch.Generator().manual_seed(seed)
        self.positions = torch.randint(0, POSITIONS, (tokens,), generator=generator).int().to(DEVICE)
        self.norms = (random(dim, seed=2), random(dim, seed=3)) if normed else None
        self.q = nans_like(self.qkv, tokens, self.heads, dim)
        # What lies before the caches shows whether a place of -1 was written.
        self.memory = [nans_like(self.qkv, BLOCKS + 1, BLOCK_TOKENS, self.kv_heads, dim) for _ in ("keys", "values")]
        self.keys, self.values = (memory[1:] for memory in self.memory)

    def run(self, kv_slots: list[int]) -> None:
        places = torch.tensor(kv_slots, dtype=torch.int32, device=DEVICE)
        rotate_and_store(
            self.qkv, self.q, self.keys, self.values, self.positions, places, self.cos, self.sin, self.norms, EPS
        )

    def exact(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries, keys and values, float64 [tokens, heads, dim]."""
        rows = self.qkv.double().view(len(self.qkv), -1, self.dim)
        q, k, v = rows.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        if self.norms:
            q, k = norm(q, self.norms[0]), norm(k, self.norms[1])
        return self._turned(q), self._turned(k), v

    def _turned(self, heads: torch.Tensor) -> torch.Tensor:
        at = self.positions.long()
        cos, sin = (table[at].double().repeat(1, 2)[:, None] for table in (self.cos, self.sin))
        low, high = heads.chunk(2, dim=-1)
        return heads * cos + torch.cat([-high, low], dim=-1) * sin


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "head norms"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("dim", [24, 32])
def test_heads_are_normed_rotated_and_kept(dtype: torch.dtype, dim: int, normed: bool) -> None:
    heads = Heads(dtype, dim, tokens=4, normed=normed)
    slots = [9, 0, 7, 4]
    heads.run(slots)
    q, k, v = heads.exact()
    # Where two terms cancel, what float32 rounds of them is left.
    tolerance = {"rtol": TOLERANCE[dtype], "atol": 1e-6}
    torch.testing.assert_close(heads.q.double(), q, **tolerance)
    torch.testing.assert_close(heads.keys.flatten(0, 1)[slots].double(), k, **tolerance)
    assert torch.equal(heads.values.flatten(0, 1)[slots].double(), v), "values are kept as they are"


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "head norms"])
def test_keys_and_values_are_stored_only_at_their_slots(normed: bool) -> None:
    heads = Heads(torch.bfloat16, 24, tokens=3, normed=normed)
    heads.run([-1, 5, -1])
    assert not heads.q.isnan().any(), "queries of tokens that are not kept are there all the same"
    for memory in heads.memory:
        kept = ~memory.flatten(0, 1).isnan().flatten(1)
        assert kept[BLOCK_TOKENS + 5].all()
        kept[BLOCK_TOKENS + 5] = False
        assert not kept.any()


def test_the_projection_does_not_change() -> None:
    heads = Heads(torch.float32, 24, tokens=2, normed=True)
    before = heads.qkv.clone()
    heads.run([1, 2])
    assert torch.equal(heads.qkv, before)


def test_nobody_is_there() -> None:
    empty = torch.empty(0, 12, device=DEVICE)
    assert add_rms_norm(empty, empty, torch.ones(12, device=DEVICE), EPS, empty).shape == (0, 12)
    assert silu_mul(empty, torch.empty(0, 6, device=DEVICE)).shape == (0, 6)
    heads = Heads(torch.float32, 24, tokens=0, normed=False)
    heads.run([])
    assert heads.keys.isnan().all()


def test_operands_that_do_not_fit_are_refused() -> None:
    x, weight = random(4, 8), random(8)
    with pytest.raises(AssertionError):
        add_rms_norm(x, x[:2], weight, EPS, torch.empty_like(x))
    with pytest.raises(AssertionError):
        add_rms_norm(random(8, 4).t(), None, weight, EPS, torch.empty_like(x))
    with pytest.raises(AssertionError):
        silu_mul(x, torch.empty(4, 3, device=DEVICE))
    heads = Heads(torch.float32, 24, tokens=2, normed=False)
    heads.qkv = heads.qkv[:, 24:]
    with pytest.raises(AssertionError):
        heads.run([0, 1])
