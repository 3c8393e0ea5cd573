"""The compiled part of cpu.py: keeping keys and values, and causal attention over paged KV.

A part of a call is a tile of query tokens of one sequence with all query heads of one KV head. Scores, softmax and the
weighted sum run over absolute positions in one order: how many rows of queries share a pass leaves no trace.
"""

import numpy as np

from loraserve.kernels.attention.kv import GROUP_TOKENS
from loraserve.kernels.attention.vector_blocks import make_score_block, softmax
from loraserve.kernels.compiled import Kernel, called, inlined
from loraserve.kernels.memory import as_float, floats, int32s, int64s, take_part
from loraserve.kernels.vector_ir import LANES, STEP, make_axpy_block, make_mix_block

MOST_ROWS = 4
MIX_VECTORS = 4

_score_1, _score_2, _score_3, _score_4 = (make_score_block(rows, GROUP_TOKENS) for rows in (1, 2, 3, 4))
_wide_1, _wide_2, _wide_3, _wide_4 = (make_mix_block(rows, MIX_VECTORS, "float32") for rows in (1, 2, 3, 4))
_narrow = make_mix_block(1, 1, "float32")
_axpy = make_axpy_block(1, 1, "float32")


@inlined
def _score(rows, q, q_stride, keys, dim, out, out_stride, ahead):  # type: ignore[no-untyped-def]
    if rows == 4:
        _score_4(q, q_stride, keys, dim, out, out_stride, ahead)
    elif rows == 3:
        _score_3(q, q_stride, keys, dim, out, out_stride, ahead)
    elif rows == 2:
        _score_2(q, q_stride, keys, dim, out, out_stride, ahead)
    else:
        _score_1(q, 0, keys, dim, out, out_stride, ahead)


@inlined
def _mix_wide(rows, out, out_stride, weights, span, values, dim, count, ahead):  # type: ignore[no-untyped-def]
    if rows == 4:
        _wide_4(out, out_stride, weights, span, values, dim, count, ahead)
    elif rows == 3:
        _wide_3(out, out_stride, weights, span, values, dim, count, ahead)
    elif rows == 2:
        _wide_2(out, out_stride, weights, span, values, dim, count, ahead)
    else:
        _wide_1(out, 0, weights, span, values, dim, count, ahead)


@called("f32")
def _mix(rows, out, out_stride, weights, span, values, dim, count, ahead):  # type: ignore[no-untyped-def]
    """out[row] += sum over p < count of weights[row, p] * values[p], in the order of p."""
    wide = dim - dim % (MIX_VECTORS * LANES)
    whole = dim - dim % LANES
    for first in range(0, wide, MIX_VECTORS * LANES):
        _mix_wide(rows, out + first * 4, out_stride, weights, span, values + first * 4, dim, count, ahead + first * 4)
    for row in range(rows if wide < dim else 0):
        target = out + row * out_stride * 4
        source = weights + row * span * 4
        for first in range(wide, whole, LANES):
            _narrow(target + first * 4, 0, source, span, values + first * 4, dim, count, ahead + first * 4)
        for p in range(count if whole < dim else 0):
            _axpy(target + whole * 4, 0, source + p * 4, 0, values + (p * dim + whole) * 4, 0, dim - whole)


@inlined
def _place(table, position, layout):  # type: ignore[no-untyped-def]
    """Bytes from the cache's start to where the group of this position begins, or, for values, the position itself."""
    block_stride, head_start, block, dim = layout
    return (table[position // block] * block_stride + head_start + position % block * dim) * 4


@called("f32")
def _attend(rows, growth, q, out, stride, shortest, keys, values, table, layout, scale, scores, span):  # type: ignore[no-untyped-def]
    """Rows of queries of one KV head; row i attends to ``shortest`` + i * growth positions.

    ``layout``: elements from block to block, where the head lies in one, tokens of a block, head_dim.
    """
    dim = layout[3]
    start = _place(table, 0, layout)
    longest = shortest + growth * (rows - 1)
    for first in range(0, longest, GROUP_TOKENS):
        ahead = values + start
        if first + GROUP_TOKENS < longest:
            ahead = keys + _place(table, first + GROUP_TOKENS, layout)
        _score(rows, q, stride, keys + _place(table, first, layout), dim, scores + first * 4, span, ahead)
    for row in range(rows):
        softmax(scores + row * span * 4, shortest + growth * row, scale)
        floats(out + row * stride * 4, dim)[:] = np.float32(0.0)
    for first in range(0, shortest, GROUP_TOKENS):
        count = min(GROUP_TOKENS, shortest - first)
        place = values + _place(table, first, layout)
        ahead = place
        if first + GROUP_TOKENS < shortest:
            ahead = values + _place(table, first + GROUP_TOKENS, layout)
        _mix(rows, out, stride, scores + first * 4, span, place, dim, count, ahead)
    for row in range(1, rows if growth > 0 else 1):
        for p in range(shortest, shortest + row):
            place = values + _place(table, p, layout)
            _mix(1, out + row * stride * 4, 0, scores + (row * span + p) * 4, span, place, dim, 1, place)


@inlined
def _tile(q, out, start, stop, past, kv_head, heads, kv_heads, keys, values, table, block, dim, scale, scores, span):  # type: ignore[no-untyped-def]
    """Query tokens start..stop of one sequence and the heads of one KV head; ``past`` is the first one's position."""
    layout = (kv_heads * block * dim, kv_head * block * dim, block, dim)
    group = heads // kv_heads
    first_head = kv_head * group
    if stop - start == 1:
        for head in range(first_head, first_head + group, MOST_ROWS):
            rows = min(MOST_ROWS, first_head + group - head)
            place = (start * heads + head) * dim * 4
            _attend(rows, 0, q + place, out + place, dim, past + 1, keys, values, table, layout, scale, scores, span)
        return
    for head in range(first_head, first_head + group):
        for token in range(start, stop, MOST_ROWS):
            rows = min(MOST_ROWS, stop - token)
            place = (token * heads + head) * dim * 4
            length = past + token - start + 1
            _attend(
                rows,
                1,
                q + place,
                out + place,
                heads * dim,
                length,
                keys,
                values,
                table,
                layout,
                scale,
                scores,
                span,
            )


def _attend_all(operands):  # type: ignore[no-untyped-def]
    o = int64s(operands, 16)
    q, out, keys, values = o[1], o[2], o[3], o[4]
    sequences, tables, table_width = o[5], o[6], o[7]
    query_start, seq_len = int32s(o[8], sequences + 1), int32s(o[9], sequences)
    heads, kv_heads, block, dim, scale, tile_tokens = o[10], o[11], o[12], o[13], as_float(o[14]), o[15]
    span = np.int64(STEP)
    for s in range(sequences):
        span = max(span, np.int64(seq_len[s] + 2 * STEP))
    scores = np.empty(MOST_ROWS * span, np.float32)
    mine = take_part(operands)
    part = 0
    for s in range(sequences):
        last = np.int64(query_start[s + 1])
        table = int32s(tables + s * table_width * 4, table_width)
        for start in range(np.int64(query_start[s]), last, tile_tokens):
            stop = min(start + tile_tokens, last)
            past = seq_len[s] - (last - start)
            for kv_head in range(kv_heads):
                if part == mine:
                    _tile(
                        q,
                        out,
                        start,
                        stop,
                        past,
                        kv_head,
                        heads,
                        kv_heads,
                        keys,
                        values,
                        table,
                        block,
                        dim,
                        scale,
                        scores.ctypes.data,
                        span,
                    )
                    mine = take_part(operands)
                part += 1


def _keep_all(operands):  # type: ignore[no-untyped-def]
    o = int64s(operands, 14)
    k, v, keys, values = o[1], o[2], o[3], o[4]
    k_token, k_head, v_token, v_head = o[5], o[6], o[7], o[8]
    tokens, kv_heads, block, dim = o[9], o[10], o[11], o[12]
    slots = int64s(o[13], tokens)
    for t in range(tokens):
        for head in range(kv_heads):
            start = slots[t] // block * kv_heads + head
            inside = slots[t] % block
            group = (start * block + inside - inside % GROUP_TOKENS) * dim
            place = inside % GROUP_TOKENS
            source = floats(k + (t * k_token + head * k_head) * 4, dim)
            target = floats(keys + group * 4, dim * GROUP_TOKENS)
            for d in range(dim):
                target[d * GROUP_TOKENS + place] = source[d]
            floats(values + (group + place * dim) * 4, dim)[:] = floats(v + (t * v_token + head * v_head) * 4, dim)


ATTEND, KEEP = Kernel(_attend_all), Kernel(_keep_all)
