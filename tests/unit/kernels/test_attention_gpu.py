"""Compares GPU attention over gathered blocks with float64. Memory that must not be read is NaN."""

from typing import Any

import pytest
import torch

from loraserve.kernels.attention import gpu
from loraserve.kernels.attention.gpu import GpuAttentionBatch, GpuKvCache, attend, gpu_block_bytes, pick_backend
from loraserve.model_shape import ModelShape

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
BLOCK_TOKENS, LAYER, SCALE, NAN = 4, 1, 0.21, float("nan")
SHAPES = {
    "one to one": ModelShape(layers=2, hidden=8, heads=2, kv_heads=2, head_dim=16, ffn=8, vocab=8),
    "groups of three": ModelShape(layers=2, hidden=8, heads=6, kv_heads=2, head_dim=8, ffn=8, vocab=8),
    "one for all": ModelShape(layers=2, hidden=8, heads=5, kv_heads=1, head_dim=24, ffn=8, vocab=8),
}
MIXES = {
    "whole prompts": [(0, 9), (0, 1), (0, 12)],
    "chunks behind a cached prefix": [(8, 14), (3, 5), (4, 8)],
    "decodes": [(7, 8), (0, 1), (16, 17), (3, 4)],
    "decodes before prompts": [(5, 6), (11, 12), (0, 7), (4, 9)],
    "decodes between prompts": [(0, 3), (2, 3), (18, 19), (5, 8), (9, 10)],
}
"""For each sequence, the number of tokens with KV before and after the step."""


class Paged:
    """Sequences of random heads in scattered blocks of a cache; the rest of the cache is NaN."""

    def __init__(self, shape: ModelShape, spans: list[tuple[int, int]], dtype: torch.dtype = torch.float32) -> None:
        self.spans = spans
        self.generator = torch.Generator().manual_seed(len(spans))
        counts = [-(-stop // BLOCK_TOKENS) for _, stop in spans]
        self.cache = GpuKvCache(shape, sum(counts) + 2, BLOCK_TOKENS, dtype, DEVICE)
        self.cache.keys.fill_(NAN)
        self.cache.values.fill_(NAN)
        ids = iter(torch.randperm(sum(counts) + 2, generator=self.generator).tolist())
        # Past its own blocks a row of the table names one that is all NaN.
        self.table = torch.full((len(spans), max(counts) + 1), next(ids), dtype=torch.int32)
        self.k, self.v = [], []
        for row, count, (_, stop) in zip(self.table, counts, spans, strict=True):
            row[:count] = torch.tensor([next(ids) for _ in range(count)])
            self.k.append(self._kept(self.cache.keys, row, stop))
            self.v.append(self._kept(self.cache.values, row, stop))
        tokens = sum(stop - start for start, stop in spans)
        self.q = self._random(tokens, shape.heads, shape.head_dim).to(dtype).to(DEVICE)

    def batch(self, captured: bool = False, padding: int = 0) -> GpuAttentionBatch:
        """Return the step with ``padding`` rows that write nothing; ``captured`` omits the lengths, as a graph does."""
        queries = [stop - start for start, stop in self.spans] + [1] * padding
        lengths = [stop for _, stop in self.spans] + [1] * padding
        extra = torch.zeros(padding, self.table.shape[1], dtype=torch.int32)
        return GpuAttentionBatch(
            query_start=torch.tensor([0, *queries]).cumsum(0).int().to(DEVICE),
            seq_len=torch.tensor(lengths, dtype=torch.int32).to(DEVICE),
            table=torch.cat([self.table, extra]).to(DEVICE),
            queries=() if captured else tuple(queries),
            lengths=() if captured else tuple(lengths),
        )

    def exact(self) -> torch.Tensor:
        """Return float64 [tokens, heads * dim], computed sequence by sequence without a cache."""
        queries = self.q.double().split([stop - start for start, stop in self.spans])
        return torch.cat([_attention(q, k, v) for q, k, v in zip(queries, self.k, self.v, strict=True)])

    def _random(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, generator=self.generator)

    def _kept(self, cache: torch.Tensor, blocks: torch.Tensor, length: int) -> torch.Tensor:
        """Return the contents of a sequence's blocks, float64 [length, kv_heads, dim]."""
        rows = self._random(length, *cache.shape[3:]).to(cache.dtype)
        place = torch.arange(length)
        cache[LAYER, blocks[place // BLOCK_TOKENS].long(), place % BLOCK_TOKENS] = rows.to(DEVICE)
        return rows.double().to(DEVICE)


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("thd,phd->htp", q, k.repeat_interleave(group, 1)) * SCALE
    future = torch.ones(len(q), len(k), device=q.device).triu(len(k) - len(q) + 1).bool()
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)
    return torch.einsum("htp,phd->thd", weights, v.repeat_interleave(group, 1)).flatten(1)


def gathered(paged: Paged, batch: GpuAttentionBatch, q: torch.Tensor | None = None) -> torch.Tensor:
    return attend(paged.q if q is None else q, paged.cache, batch, LAYER, SCALE, "gathered")


def assert_close(out: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    assert out.shape == exact.shape
    assert out.dtype == dtype
    assert (out - exact).abs().max() <= TOLERANCE[dtype] * exact.abs().max()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_equals_float64(shape: ModelShape, mix: list[tuple[int, int]]) -> None:
    paged = Paged(shape, mix)
    assert_close(gathered(paged, paged.batch()), paged.exact())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_half_the_bytes_are_near_it(dtype: torch.dtype, mix: list[tuple[int, int]]) -> None:
    paged = Paged(SHAPES["groups of three"], mix, dtype)
    assert_close(gathered(paged, paged.batch()), paged.exact(), dtype)


def test_decoding_sequences_are_computed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding sequences share one launch. One launch for each would take longer than the rest of the step."""
    together: list[int] = []
    decode = gpu._gathered_decode

    def noted(q: torch.Tensor, *others: Any) -> None:
        together.append(len(q))
        decode(q, *others)

    monkeypatch.setattr(gpu, "_gathered_decode", noted)
    paged = Paged(SHAPES["one to one"], [*MIXES["decodes"], (0, 5)])
    assert_close(gathered(paged, paged.batch()), paged.exact())
    assert together == [len(MIXES["decodes"])]


@pytest.mark.parametrize("tokens", [1, 2 * 6 * BLOCK_TOKENS, 3 * 6 * BLOCK_TOKENS - 1])
def test_gathered_kv_stays_within_its_limit(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setattr(gpu, "GATHERED_TOKENS", tokens)
    together: list[int] = []
    attention = gpu.functional.scaled_dot_product_attention

    def noted(q: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
        together.append(len(q))
        return attention(q, *others, **options)

    monkeypatch.setattr(gpu.functional, "scaled_dot_product_attention", noted)
    paged = Paged(SHAPES["groups of three"], [*MIXES["decodes"], (21, 22)])
    assert_close(gathered(paged, paged.batch()), paged.exact())
    assert together == ([1] * 5 if tokens == 1 else [2, 2, 1])


@pytest.mark.parametrize("padding", [0, 3])
def test_a_captured_graph_depends_on_neither_lengths_nor_sequences(padding: int) -> None:
    paged = Paged(SHAPES["groups of three"], MIXES["decodes"])
    paged.table = torch.nn.functional.pad(paged.table, (0, 4), value=int(paged.table[0, -1]))
    q = torch.cat([paged.q, torch.ones(padding, *paged.q.shape[1:], device=DEVICE)])
    out = gathered(paged, paged.batch(captured=True, padding=padding), q)
    assert_close(out[: len(paged.spans)], paged.exact())
    assert len(out) == len(q)


def test_padded_rows_read_a_fresh_cache_without_nan() -> None:
    shape = SHAPES["one for all"]
    cache = GpuKvCache(shape, 2, BLOCK_TOKENS, torch.float32, DEVICE)
    start, table = torch.arange(3, device=DEVICE).int(), torch.zeros(2, 5, dtype=torch.int32, device=DEVICE)
    batch = GpuAttentionBatch(start, torch.ones(2, dtype=torch.int32, device=DEVICE), table)
    q = torch.ones(2, shape.heads, shape.head_dim, device=DEVICE)
    assert not attend(q, cache, batch, 0, SCALE, "gathered").any()


def test_nan_of_its_own_past_is_not_hidden() -> None:
    paged = Paged(SHAPES["one to one"], [(5, 6), (5, 6)])
    paged.cache.keys[LAYER, paged.table[1, 0], 2] = NAN
    out = gathered(paged, paged.batch())
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="says what is so without a GPU")
def test_without_a_gpu_blocks_are_gathered() -> None:
    assert pick_backend(SHAPES["one to one"], 16, torch.bfloat16, DEVICE) == ("gathered", "no GPU")


@pytest.mark.parametrize("error", [RuntimeError, TypeError, ValueError])
def test_the_reason_for_gathering_is_one_line(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def fail(*arguments: Any) -> None:
        raise error("page size must be a multiple of 256\nstack of frames")

    pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(gpu, "_try_paged", fail)
    picked = pick_backend(SHAPES["one to one"], 16, torch.bfloat16, torch.device("cuda"))
    assert picked == ("gathered", "varlen_attn with block tables: page size must be a multiple of 256")


@pytest.mark.parametrize(
    ("off", "picked"),
    [
        (0.0, ("paged", "varlen_attn reads the block tables")),
        (0.5, ("gathered", "varlen_attn with block tables gave a wrong result")),
        (NAN, ("gathered", "varlen_attn with block tables gave a wrong result")),
    ],
)
def test_paged_attention_is_chosen_if_its_result_is_right(
    monkeypatch: pytest.MonkeyPatch, off: float, picked: tuple[str, str]
) -> None:
    def paged(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Any, scale: float) -> torch.Tensor:
        out = torch.empty_like(q)
        gpu._gathered(q, out, keys, values, batch, scale)
        out[1] += off  # in the middle of a chunk
        return out

    monkeypatch.setattr(gpu, "_paged", paged)
    assert gpu._try_paged(SHAPES["groups of three"], 16, torch.float32, DEVICE) == picked


def test_paged_attention_that_reads_beyond_the_kv_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight of zero would hide such a read unless the value is NaN."""

    def paged(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Any, scale: float) -> torch.Tensor:
        out = torch.empty_like(q)
        gpu._gathered(q, out, keys, values, batch, scale)
        return out + 0.0 * values[batch.table[0].long()].sum()

    monkeypatch.setattr(gpu, "_paged", paged)
    assert gpu._try_paged(SHAPES["groups of three"], 16, torch.float32, DEVICE)[0] == "gathered"


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_memory_of_a_block(dtype: torch.dtype) -> None:
    cache = GpuKvCache(SHAPES["groups of three"], 5, 16, dtype, DEVICE)
    held = cache.keys.untyped_storage().nbytes() + cache.values.untyped_storage().nbytes()
    assert held == 5 * gpu_block_bytes(SHAPES["groups of three"], 16, dtype)
