"""Paged causal attention on the CPU, prefill chunks and decode tokens in one call.

Same signature and meaning as reference.py. A token's output depends on its own query and past alone, to the bit: not on
chunks, neighbours, blocks or threads.
"""

import torch

from loraserve.kernels.attention.batch import AttentionBatch
from loraserve.kernels.attention.cpu_kernels import ATTEND, KEEP
from loraserve.kernels.attention.kv import KvCache
from loraserve.kernels.dense import assert_dense
from loraserve.kernels.memory import float_bits
from loraserve.kernels.workers import run

TILE_TOKENS = 16
SHARE_WORK_SCORES = 1500
"""Scores from which a second thread brings more than calling it costs."""


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

    ``k`` and ``v`` may be strided views into one fused projection; ``q`` is dense. ``scale`` > 0.
    """
    tokens, heads, dim = q.shape
    kv_heads, block = cache.shape.kv_heads, cache.block_tokens
    assert_dense(q, (tokens, heads, dim))
    keys, values = cache.keys[layer].data_ptr(), cache.values[layer].data_ptr()
    _keep(k, v, keys, values, batch.slot_mapping, (tokens, kv_heads, dim), block)
    out = torch.empty(tokens, heads * dim)
    run(
        ATTEND,
        batch.scores * heads > SHARE_WORK_SCORES,
        q.data_ptr(),
        out.data_ptr(),
        keys,
        values,
        batch.sequences,
        batch.block_table.data_ptr(),
        batch.block_table.shape[1],
        batch.query_start.data_ptr(),
        batch.seq_len.data_ptr(),
        heads,
        kv_heads,
        block,
        dim,
        float_bits(scale),
        TILE_TOKENS,
    )
    return out


def _keep(
    k: torch.Tensor,
    v: torch.Tensor,
    keys: int,
    values: int,
    slot_mapping: torch.Tensor,
    shape: tuple[int, int, int],
    block: int,
) -> None:
    assert k.shape == v.shape == shape, (k.shape, v.shape, shape)
    assert k.dtype == v.dtype == torch.float32, (k.dtype, v.dtype)
    k_token, k_head, k_element = k.stride()
    v_token, v_head, v_element = v.stride()
    assert k_element == v_element == 1, (k.stride(), v.stride())
    run(
        KEEP,
        False,
        k.data_ptr(),
        v.data_ptr(),
        keys,
        values,
        k_token,
        k_head,
        v_token,
        v_head,
        *shape[:2],
        block,
        shape[2],
        slot_mapping.data_ptr(),
    )


def warm_up() -> None:
    """Compile, or load from the cache, everything that a step may call."""
    ATTEND.warm_up()
    KEEP.warm_up()
