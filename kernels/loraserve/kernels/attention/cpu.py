"""Paged causal attention on the CPU, prefill chunks and decode tokens in one call.

Same signature and meaning as reference.py. Scores, softmax and the weighted sum run over absolute positions in one
order, so that a token's output depends on its own query and past alone: not on chunks, neighbours, blocks or threads.
"""

import numpy as np
import torch
from numba import njit

from loraserve.kernels.attention.batch import AttentionBatch
from loraserve.kernels.attention.kv import GROUP_TOKENS, KvCache
from loraserve.kernels.attention.vector_blocks import make_mix_block, make_score_block
from loraserve.kernels.dense import assert_dense
from loraserve.kernels.vector_ir import LANES, bits_to_f32, make_axpy_block, make_dot_block
from loraserve.kernels.workers import parts, run_parts
from loraserve.model_shape import ModelShape

TILE_QUERIES = 16
SHARE_WORK_SCORES = 4096
"""Scores below which waking another thread costs more than it brings."""

MIX_VECTORS = 4

_score_1 = make_score_block(1, GROUP_TOKENS)
_score_2 = make_score_block(2, GROUP_TOKENS)
_mix_1 = make_mix_block(1, MIX_VECTORS)
_mix_2 = make_mix_block(2, MIX_VECTORS)
_dot_1x1 = make_dot_block(1, 1, "float32")
_axpy_1x1 = make_axpy_block(1, 1, "float32")


@njit(cache=True, nogil=True, inline="always")
def _exp(x):  # type: ignore[no-untyped-def]
    """e**x for x <= 0 within 2 ulp, in plain operations that vectorise to the same bits (Cephes expf)."""
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
    return value * bits_to_f32((np.int32(n) + np.int32(127)) << np.int32(23))


@njit(cache=True, nogil=True)
def _softmax(scores, ones, length, scale):  # type: ignore[no-untyped-def]
    """scores[:length] become softmax(scale * scores)."""
    largest = scores[0]
    for p in range(1, length):
        largest = max(largest, scores[p])
    for p in range(length):
        scores[p] = _exp((scores[p] - largest) * scale)
    total = np.empty(1, np.float32)
    _dot_1x1(scores.ctypes.data, 0, ones.ctypes.data, 0, length, total.ctypes.data, 0)
    inverse = np.float32(1.0) / total[0]
    for p in range(length):
        scores[p] *= inverse


@njit(cache=True, nogil=True)
def _mix(rows, out, out_stride, weights, span, values, dim, count):  # type: ignore[no-untyped-def]
    """out[row] += sum over p < count of weights[row, p] * values[p], in the order of p."""
    wide = dim - dim % (MIX_VECTORS * LANES)
    for first in range(0, wide, MIX_VECTORS * LANES):
        if rows == 2:
            _mix_2(out + first * 4, out_stride, weights, span, values + first * 4, dim, count)
        else:
            _mix_1(out + first * 4, 0, weights, span, values + first * 4, dim, count)
    if wide < dim:
        for row in range(rows):
            for p in range(count):
                source = weights + (row * span + p) * 4
                target = out + (row * out_stride + wide) * 4
                _axpy_1x1(target, 0, source, 0, values + (p * dim + wide) * 4, 0, dim - wide)


@njit(cache=True, nogil=True)
def _attend(  # type: ignore[no-untyped-def]
    rows, q, q_stride, shorter, longer, keys, values, table, head_stride, block_stride, block, dim, scale, out, scores
):
    """One or two query rows of one KV head. ``shorter`` and ``longer`` are the lengths of their pasts."""
    span = scores.shape[1]
    start = scores.ctypes.data
    for first in range(0, longer, GROUP_TOKENS):
        place = (table[first // block] * block_stride + head_stride + (first % block) * dim) * 4
        if rows == 2:
            _score_2(q, q_stride, keys + place, dim, start + first * 4, span)
        else:
            _score_1(q, 0, keys + place, dim, start + first * 4, span)
    _softmax(scores[0], scores[2], shorter, scale)
    if rows == 2:
        _softmax(scores[1], scores[2], longer, scale)
    for first in range(0, shorter, GROUP_TOKENS):
        place = (table[first // block] * block_stride + head_stride + (first % block) * dim) * 4
        count = min(GROUP_TOKENS, shorter - first)
        _mix(rows, out, q_stride, start + first * 4, span, values + place, dim, count)
    if longer > shorter:
        last = longer - 1
        place = (table[last // block] * block_stride + head_stride + (last % block) * dim) * 4
        _mix(1, out + q_stride * 4, 0, start + (span + last) * 4, span, values + place, dim, 1)


@njit(cache=True, nogil=True)
def _attend_tile(  # type: ignore[no-untyped-def]
    q, out, start, stop, past, kv_head, group, heads, kv_heads, block, dim, keys, values, table, scale, scores
):
    """Query tokens start..stop of one sequence and all heads of one KV head; ``past`` is the first one's position."""
    block_stride = kv_heads * block * dim
    head_stride = kv_head * block * dim
    single = stop - start == 1
    outer = 1 if single else group
    inner = group if single else stop - start
    for o in range(outer):
        i = 0
        while i < inner:
            rows = 2 if i + 1 < inner else 1
            head = kv_head * group + (i if single else o)
            token = start if single else start + i
            stride = dim if single else heads * dim
            shorter = past + (token - start) + 1
            longer = shorter if single or rows == 1 else shorter + 1
            place = (token * heads + head) * dim * 4
            _attend(
                rows,
                q + place,
                stride,
                shorter,
                longer,
                keys,
                values,
                table,
                head_stride,
                block_stride,
                block,
                dim,
                scale,
                out + place,
                scores,
            )
            i += rows


@njit(cache=True, nogil=True)
def attend_part(  # type: ignore[no-untyped-def]
    part, count, q, out, keys, values, query_start, seq_len, tables, heads, kv_heads, block, dim, scale
):
    """This part's share: tiles of queries by KV head, given out by cost to the least loaded part."""
    loads = np.zeros(count, np.int64)
    longest = 0
    for s in range(len(seq_len)):
        longest = max(longest, seq_len[s])
    scores = np.empty((3, longest + GROUP_TOKENS), np.float32)
    scores[2] = np.float32(1.0)
    for s in range(len(seq_len)):
        for start in range(query_start[s], query_start[s + 1], TILE_QUERIES):
            stop = min(start + TILE_QUERIES, query_start[s + 1])
            past = seq_len[s] - (query_start[s + 1] - start)
            for kv_head in range(kv_heads):
                least = 0
                for other in range(1, count):
                    if loads[other] < loads[least]:
                        least = other
                loads[least] += (past + 1) * (stop - start) + 8
                if least == part:
                    _attend_tile(
                        q,
                        out,
                        start,
                        stop,
                        past,
                        kv_head,
                        heads // kv_heads,
                        heads,
                        kv_heads,
                        block,
                        dim,
                        keys,
                        values,
                        tables[s],
                        scale,
                        scores,
                    )


@njit(cache=True, nogil=True)
def _write_kv(k, v, keys, values, slot_mapping, block):  # type: ignore[no-untyped-def]
    for t in range(len(slot_mapping)):
        index = slot_mapping[t] // block
        group = slot_mapping[t] % block // GROUP_TOKENS
        place = slot_mapping[t] % GROUP_TOKENS
        for head in range(k.shape[1]):
            for d in range(k.shape[2]):
                keys[index, head, group, d, place] = k[t, head, d]
                values[index, head, group, place, d] = v[t, head, d]


def paged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: KvCache,
    batch: AttentionBatch,
    layer: int,
    scale: float,
) -> torch.Tensor:
    """Keep k and v, then causal attention of q over each sequence's own KV; shapes as in reference.py.

    ``k`` and ``v`` may be strided views into one fused projection; ``q`` is dense.
    """
    tokens, heads, dim = q.shape
    assert_dense(q, (tokens, heads, dim))
    kv_heads = cache.shape.kv_heads
    keys, values = cache.keys[layer].numpy(), cache.values[layer].numpy()
    _write_kv(k.numpy(), v.numpy(), keys, values, batch.slot_mapping.numpy(), cache.block_tokens)
    out = torch.zeros(tokens, heads * dim)
    query_start, seq_len = batch.query_start.numpy(), batch.seq_len.numpy()
    scores = int(seq_len.sum()) * heads * max(1, tokens // max(1, len(seq_len)))
    arguments = (
        q.data_ptr(),
        out.data_ptr(),
        keys.ctypes.data,
        values.ctypes.data,
        query_start,
        seq_len,
        batch.block_table.numpy(),
        heads,
        kv_heads,
        cache.block_tokens,
        dim,
        np.float32(scale),
    )
    run_parts(attend_part, parts() if scores >= SHARE_WORK_SCORES else 1, arguments)
    return out


def warm_up() -> None:
    """Compile, or load from the cache, everything that a step may call."""
    shape = ModelShape(layers=1, hidden=16, heads=1, kv_heads=1, head_dim=16, ffn=16, vocab=16)
    cache = KvCache(shape, 1)
    batch = AttentionBatch(
        query_start=torch.tensor([0, 1], dtype=torch.int32),
        seq_len=torch.tensor([1], dtype=torch.int32),
        block_table=torch.zeros(1, 1, dtype=torch.int32),
        slot_mapping=torch.zeros(1, dtype=torch.int64),
    )
    fused = torch.zeros(1, 3, 16)
    for k, v in ((fused[:, 1:2], fused[:, 2:3]), (torch.zeros(1, 1, 16), torch.zeros(1, 1, 16))):
        paged_attention(torch.zeros(1, 1, 16), k, v, cache, batch, 0, 1.0)
