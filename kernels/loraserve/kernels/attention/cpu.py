"""Paged causal attention on the CPU, prefill chunks and decode tokens in one call.

``paged_attention`` has the signature of the function in reference.py. The bits of a token's output depend only on its
query and its KV. Chunking, other sequences, block placement and threads do not affect them. Scores, softmax and
weighted sums run over the positions in one fixed order.

Several threads compute one call (see cpu/threads.py). Each takes up to 16 query tokens of one sequence at a time, with
the query heads that share one KV head.
"""

import numpy as np
import torch

from loraserve.kernels.attention.batch import GROUP_TOKENS, AttentionBatch, KvCache
from loraserve.kernels.attention.vector_blocks import make_score_block, softmax
from loraserve.kernels.cpu.compiled import Kernel, called, inlined
from loraserve.kernels.cpu.operands import (
    OperandBlock,
    assert_dense,
    floats,
    fractions,
    int32s,
    int64s,
    integers,
    reader,
    take_part,
)
from loraserve.kernels.cpu.threads import run
from loraserve.kernels.cpu.vector_code import LANES, STEP, block_of_size, make_axpy_block, make_mix_block

MAX_ROWS = 4
"""Maximum number of query rows that one pass over keys and values computes."""
MIX_VECTORS = 4
TILE_TOKENS = 16
SHARED_SCORES = 1500
"""Above this many scores a second thread saves more time than starting it costs."""


class AttendCall(OperandBlock):
    """Operands of ``_attend_all``. ``keys`` and ``values`` point to one layer of the cache."""

    __slots__ = ()
    _fields_ = (
        *integers("q", "out", "keys", "values", "sequences", "block_table", "table_width", "query_start", "seq_len"),
        *integers("heads", "kv_heads", "block_tokens", "dim", "tile_tokens"),
        *fractions("scale"),
    )


class StoreCall(OperandBlock):
    """Operands of ``_store_all``. Strides are in elements. The elements of a head are contiguous."""

    __slots__ = ()
    _fields_ = (
        *integers("k", "v", "keys", "values", "k_token_stride", "k_head_stride", "v_token_stride", "v_head_stride"),
        *integers("tokens", "kv_heads", "block_tokens", "dim", "slot_mapping"),
    )


_attend_operands, _store_operands = reader(AttendCall), reader(StoreCall)

_score = block_of_size((4, 3, 2, 1), lambda rows: make_score_block(rows, GROUP_TOKENS))
_mix_wide = block_of_size((4, 3, 2, 1), lambda rows: make_mix_block(rows, MIX_VECTORS, "float32"))
_narrow = make_mix_block(1, 1, "float32")
_axpy = make_axpy_block(1, 1, "float32")


@called("f32")
def _mix(rows, out, out_stride, weights, span, values, dim, count, ahead):  # type: ignore[no-untyped-def]
    """Add weights[row, p] * values[p] to out[row] for p = 0 to ``count`` - 1, in order. Prefetch address ``ahead``."""
    wide = dim - dim % (MIX_VECTORS * LANES)
    whole = dim - dim % LANES
    for first in range(0, wide, MIX_VECTORS * LANES):
        target, source = out + first * 4, values + first * 4
        _mix_wide(rows, (target, out_stride, weights, span, source, dim, count, ahead + first * 4))
    for row in range(rows if wide < dim else 0):
        target = out + row * out_stride * 4
        source = weights + row * span * 4
        for first in range(wide, whole, LANES):
            _narrow(target + first * 4, 0, source, span, values + first * 4, dim, count, ahead + first * 4)
        for p in range(count if whole < dim else 0):
            _axpy(target + whole * 4, 0, source + p * 4, 0, values + (p * dim + whole) * 4, 0, dim - whole)


@inlined
def _cache_offset(table, position, layout):  # type: ignore[no-untyped-def]
    """Return the byte offset in a layer of a head's value at ``position``, or of its key group that starts there.

    ``layout`` is (elements per block, elements from the block's start to the head, tokens per block, head_dim).
    """
    block_stride, head_start, block, dim = layout
    return (table[position // block] * block_stride + head_start + position % block * dim) * 4


@called("f32")
def _attend(rows, growth, q, out, stride, shortest, keys, values, table, layout, scale, scores, span):  # type: ignore[no-untyped-def]
    """Compute attention for query vectors of one KV head. Vector i reads ``shortest`` + i * ``growth`` positions."""
    dim = layout[3]
    start = _cache_offset(table, 0, layout)
    longest = shortest + growth * (rows - 1)
    for first in range(0, longest, GROUP_TOKENS):
        ahead = values + start
        if first + GROUP_TOKENS < longest:
            ahead = keys + _cache_offset(table, first + GROUP_TOKENS, layout)
        place = keys + _cache_offset(table, first, layout)
        _score(rows, (q, stride, place, dim, scores + first * 4, span, ahead))
    for row in range(rows):
        softmax(scores + row * span * 4, shortest + growth * row, scale)
        floats(out + row * stride * 4, dim)[:] = np.float32(0.0)
    for first in range(0, shortest, GROUP_TOKENS):
        count = min(GROUP_TOKENS, shortest - first)
        place = values + _cache_offset(table, first, layout)
        ahead = place
        if first + GROUP_TOKENS < shortest:
            ahead = values + _cache_offset(table, first + GROUP_TOKENS, layout)
        _mix(rows, out, stride, scores + first * 4, span, place, dim, count, ahead)
    for row in range(1, rows if growth > 0 else 1):
        for p in range(shortest, shortest + row):
            place = values + _cache_offset(table, p, layout)
            _mix(1, out + row * stride * 4, 0, scores + (row * span + p) * 4, span, place, dim, 1, place)


@inlined
def _attend_tile(o, table, start, stop, past, kv_head, scores, span):  # type: ignore[no-untyped-def]
    """Compute attention for query tokens start to stop - 1 of a sequence and all query heads of one KV head.

    ``o`` is an ``AttendCall``. ``past`` is the position of token ``start``. ``scores`` is scratch [MAX_ROWS, span].
    """
    heads, dim = o.heads, o.dim
    layout = (o.kv_heads * o.block_tokens * dim, kv_head * o.block_tokens * dim, o.block_tokens, dim)
    group = heads // o.kv_heads
    first_head = kv_head * group
    # For one token, several heads share a pass over the KV. For more, several tokens of one head share a pass.
    if stop - start == 1:
        for head in range(first_head, first_head + group, MAX_ROWS):
            rows = min(MAX_ROWS, first_head + group - head)
            at = (start * heads + head) * dim * 4
            _attend(
                rows, 0, o.q + at, o.out + at, dim, past + 1, o.keys, o.values, table, layout, o.scale, scores, span
            )
        return
    for head in range(first_head, first_head + group):
        for token in range(start, stop, MAX_ROWS):
            rows = min(MAX_ROWS, stop - token)
            at = (token * heads + head) * dim * 4
            length = past + token - start + 1
            stride = heads * dim
            _attend(
                rows, 1, o.q + at, o.out + at, stride, length, o.keys, o.values, table, layout, o.scale, scores, span
            )


def _attend_all(operands):  # type: ignore[no-untyped-def]
    o = _attend_operands(operands)
    sequences, tile_tokens = o.sequences, o.tile_tokens
    query_start, seq_len = int32s(o.query_start, sequences + 1), int32s(o.seq_len, sequences)
    span = np.int64(STEP)
    for s in range(sequences):
        span = max(span, np.int64(seq_len[s] + 2 * STEP))
    scores = np.empty(MAX_ROWS * span, np.float32)
    mine = take_part(operands)
    part = 0
    for s in range(sequences):
        last = np.int64(query_start[s + 1])
        table = int32s(o.block_table + s * o.table_width * 4, o.table_width)
        for start in range(np.int64(query_start[s]), last, tile_tokens):
            stop = min(start + tile_tokens, last)
            past = seq_len[s] - (last - start)
            for kv_head in range(o.kv_heads):
                if part == mine:
                    _attend_tile(o, table, start, stop, past, kv_head, scores.ctypes.data, span)
                    mine = take_part(operands)
                part += 1


def _store_all(operands):  # type: ignore[no-untyped-def]
    o = _store_operands(operands)
    block, dim = o.block_tokens, o.dim
    slots = int64s(o.slot_mapping, o.tokens)
    for t in range(o.tokens):
        for head in range(o.kv_heads):
            start = slots[t] // block * o.kv_heads + head
            inside = slots[t] % block
            group = (start * block + inside - inside % GROUP_TOKENS) * dim
            lane = inside % GROUP_TOKENS
            k_row = floats(o.k + (t * o.k_token_stride + head * o.k_head_stride) * 4, dim)
            v_row = floats(o.v + (t * o.v_token_stride + head * o.v_head_stride) * 4, dim)
            key_group = floats(o.keys + group * 4, dim * GROUP_TOKENS)
            for d in range(dim):
                key_group[d * GROUP_TOKENS + lane] = k_row[d]
            floats(o.values + (group + lane * dim) * 4, dim)[:] = v_row


ATTEND, STORE = Kernel(_attend_all), Kernel(_store_all)


def paged_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: KvCache, batch: AttentionBatch, layer: int, scale: float
) -> torch.Tensor:
    """Store k and v in the cache and return causal attention of q. reference.py lists the shapes.

    ``k`` and ``v`` may be strided views into one fused projection. ``q`` must be contiguous and ``scale`` positive.
    """
    tokens, heads, dim = q.shape
    assert_dense(q, (batch.slot_mapping.numel(), heads, cache.shape.head_dim))
    keys, values = cache.keys[layer], cache.values[layer]
    _store(k, v, cache, batch, layer)
    out = torch.empty(tokens, heads * dim)
    call = AttendCall(
        q=q.data_ptr(), out=out.data_ptr(), keys=keys.data_ptr(), values=values.data_ptr(), sequences=batch.sequences,
        block_table=batch.block_table.data_ptr(), table_width=batch.block_table.shape[1],
        query_start=batch.query_start.data_ptr(), seq_len=batch.seq_len.data_ptr(), heads=heads,
        kv_heads=cache.shape.kv_heads, block_tokens=cache.block_tokens, dim=dim, tile_tokens=TILE_TOKENS, scale=scale,
    )  # fmt: skip
    run(ATTEND, call, shared=batch.scores * heads > SHARED_SCORES)
    return out


def _store(k: torch.Tensor, v: torch.Tensor, cache: KvCache, batch: AttentionBatch, layer: int) -> None:
    tokens, kv_heads, dim = k.shape
    expected = (batch.slot_mapping.numel(), cache.shape.kv_heads, cache.shape.head_dim)
    assert k.shape == v.shape == expected, (k.shape, v.shape, expected)
    assert k.dtype == v.dtype == torch.float32, (k.dtype, v.dtype)
    k_token, k_head, k_element = k.stride()
    v_token, v_head, v_element = v.stride()
    assert k_element == v_element == 1, (k.stride(), v.stride())
    call = StoreCall(
        k=k.data_ptr(), v=v.data_ptr(), keys=cache.keys[layer].data_ptr(), values=cache.values[layer].data_ptr(),
        k_token_stride=k_token, k_head_stride=k_head, v_token_stride=v_token, v_head_stride=v_head, tokens=tokens,
        kv_heads=kv_heads, block_tokens=cache.block_tokens, dim=dim, slot_mapping=batch.slot_mapping.data_ptr(),
    )  # fmt: skip
    run(STORE, call, shared=False)


def warm_up() -> None:
    """Compile the attention kernels or load them from the disk cache."""
    ATTEND.warm_up()
    STORE.warm_up()
