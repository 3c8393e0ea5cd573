"""Compares the CPU kernel with its reference, the reference with float64, and the bits of different chunkings."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.kernels.attention import AttentionBatch, KvCache, block_bytes, cpu, paged_attention, reference
from loraserve.model_shape import ModelShape

SHAPES = {
    "one to one": ModelShape(layers=2, hidden=8, heads=2, kv_heads=2, head_dim=16, ffn=8, vocab=8),
    "groups of three": ModelShape(layers=2, hidden=8, heads=9, kv_heads=3, head_dim=64, ffn=8, vocab=8),
    "one for all": ModelShape(layers=2, hidden=8, heads=7, kv_heads=1, head_dim=40, ffn=8, vocab=8),
    "odd": ModelShape(layers=2, hidden=8, heads=4, kv_heads=2, head_dim=22, ffn=8, vocab=8),
}
SCALE = 0.21


def run(sequences: Any, spans: list[tuple[int, int, int]], function: Any = paged_attention) -> torch.Tensor:
    q, k, v, batch = sequences.step(spans)
    out: torch.Tensor = function(q, k, v, sequences.cache, batch, 1, SCALE)
    return out


def in_float64(sequences: Any, index: int) -> torch.Tensor:
    """Return the attention of all positions of one sequence, computed without a cache."""
    q, k, v = (part[index].double() for part in (sequences.q, sequences.k, sequences.v))
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("thd,phd->htp", q, k.repeat_interleave(group, 1)) * SCALE
    future = torch.ones(len(q), len(q)).triu(1).bool()
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)
    return torch.einsum("htp,phd->thd", weights, v.repeat_interleave(group, 1)).flatten(1)


def assert_close(out: torch.Tensor, exact: torch.Tensor) -> None:
    assert out.shape == exact.shape
    assert (out - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("block_tokens", [16, 48])
@pytest.mark.parametrize("function", [paged_attention, reference.paged_attention])
def test_equals_float64(sequences_of: Any, shape: str, block_tokens: int, function: Any) -> None:
    lengths = [1, 16, 17, 75]
    sequences = sequences_of(SHAPES[shape], lengths, block_tokens, seed=1)
    out = run(sequences, [(i, 0, n) for i, n in enumerate(lengths)], function)
    assert_close(out, torch.cat([in_float64(sequences, i) for i in range(len(lengths))]))


@settings(max_examples=25, deadline=None)
@given(data=st.data(), shape=st.sampled_from(list(SHAPES)), block_tokens=st.sampled_from([16, 32]))
def test_prefill_and_decode_mixed(sequences_of: Any, data: st.DataObject, shape: str, block_tokens: int) -> None:
    lengths = data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=5))
    starts = [data.draw(st.one_of(st.just(n - 1), st.integers(0, n - 1))) for n in lengths]
    results = []
    for function in (paged_attention, reference.paged_attention):
        sequences = sequences_of(SHAPES[shape], lengths, block_tokens, seed=len(lengths))
        before = [(i, 0, start) for i, start in enumerate(starts) if start]
        if before:
            run(sequences, before, reference.paged_attention)
        results.append(
            run(sequences, [(i, a, n) for i, (a, n) in enumerate(zip(starts, lengths, strict=True))], function)
        )
    assert_close(results[0], results[1])


@pytest.mark.parametrize("shape", list(SHAPES))
def test_the_same_bits_however_a_text_is_cut_up(sequences_of: Any, shape: str) -> None:
    length = 83

    def computed(cuts: list[int], block_tokens: int, seed: int, others: list[int]) -> torch.Tensor:
        """Compute the sequence in chunks that end at ``cuts``, in a new cache, with other sequences that decode."""
        sequences = sequences_of(SHAPES[shape], [length, *others], block_tokens, seed)
        text = sequences_of(SHAPES[shape], [length], 16, 7)
        sequences.q[0], sequences.k[0], sequences.v[0] = text.q[0], text.k[0], text.v[0]
        for i, n in enumerate(others, start=1):
            run(sequences, [(i, 0, n)])
        beside = [(i, n - 1, n) for i, n in enumerate(others, start=1)]
        pieces = zip([0, *cuts], [*cuts, length], strict=True)
        return torch.cat([run(sequences, [*beside, (0, a, b)])[len(beside) :] for a, b in pieces])

    whole = computed([], 16, 1, [])
    for cuts, block_tokens, others in (
        ([16, 32, 48, 64, 80], 16, []),
        ([5, 6, 7, 8, 41], 32, [3, 50]),
        (list(range(1, length)), 16, [20]),  # token by token: decode alone
    ):
        assert torch.equal(computed(cuts, block_tokens, len(cuts), others), whole), cuts


def test_any_number_of_threads_gives_the_same_bits(
    sequences_of: Any, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "SHARED_SCORES", 0)
    sequences = sequences_of(SHAPES["groups of three"], [90, 40, 1], 16, seed=3)
    run(sequences, [(0, 0, 30), (1, 0, 39)])
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(run(sequences, [(0, 30, 90), (1, 39, 40), (2, 0, 1)]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_keys_and_values_may_be_views_of_one_projection(sequences_of: Any) -> None:
    sequences = sequences_of(SHAPES["groups of three"], [33], 16, seed=4)
    dense = run(sequences, [(0, 0, 33)])
    q, k, v, batch = sequences.step([(0, 0, 33)])
    fused = torch.cat([q, k, v], dim=1)
    strided = paged_attention(q, fused[:, 9:12], fused[:, 12:], sequences.cache, batch, 1, SCALE)
    assert torch.equal(strided, dense)


def test_stores_the_new_keys_and_values_and_nothing_else(sequences_of: Any) -> None:
    made = [sequences_of(SHAPES["odd"], [20, 35], 16, seed=5) for _ in range(2)]
    for sequences, function in zip(made, (paged_attention, reference.paged_attention), strict=True):
        run(sequences, [(0, 0, 20), (1, 0, 34)], function)
    for ours, theirs in ((made[0].cache.keys, made[1].cache.keys), (made[0].cache.values, made[1].cache.values)):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
        assert ours[0].isnan().all()  # the other layer


@pytest.mark.parametrize("size", [1e-3, 30.0, 1e4])
def test_small_and_large_scores(sequences_of: Any, size: float) -> None:
    sequences = sequences_of(SHAPES["groups of three"], [50], 16, seed=6)
    sequences.q[0] *= size
    out = run(sequences, [(0, 0, 50)])
    # Scores of thousands lose digits before the exponential: there the error is that of float32 scores.
    assert (out - in_float64(sequences, 0)).abs().max() < 1e-5 * max(1.0, size * SCALE * 10)


def test_nan_is_not_hidden(sequences_of: Any) -> None:
    sequences = sequences_of(SHAPES["groups of three"], [20, 20], 16, seed=8)
    sequences.k[0][7, 1, 3] = float("nan")
    out = run(sequences, [(0, 0, 20), (1, 0, 20)]).view(2, 20, 9, 64)
    assert out[0, 7:, 3:6].isnan().all()
    out[0, 7:, 3:6] = 0.0
    assert out.isfinite().all()


def test_memory_of_a_block() -> None:
    shape = SHAPES["groups of three"]
    cache = KvCache(shape, 5, 32)
    assert cache.keys.numel() * 4 + cache.values.numel() * 4 == 5 * block_bytes(shape, 32)
    with pytest.raises(ValueError, match="multiple of 16"):
        KvCache(shape, 5, 24)


def test_batches_that_do_not_fit_together_are_refused(sequences_of: Any) -> None:
    sequences = sequences_of(SHAPES["odd"], [10, 10], 16, seed=9)
    q, k, v, batch = sequences.step([(0, 0, 10), (1, 0, 10)])
    for bad in ((q[:, 1:], k, v), (q, k[1:], v), (q, k, v.double()), (q.transpose(0, 1), k, v)):
        with pytest.raises(AssertionError):
            paged_attention(*bad, sequences.cache, batch, 0, SCALE)
    with pytest.raises(AssertionError):
        AttentionBatch(batch.query_start[:-1], batch.seq_len, batch.block_table, batch.slot_mapping)
    with pytest.raises(AssertionError):
        AttentionBatch(batch.query_start.long(), batch.seq_len, batch.block_table, batch.slot_mapping)
