"""Paged causal attention in plain torch. Tests compare the CPU kernel with it."""

import torch

from loraserve.kernels.attention.batch import GROUP_TOKENS, AttentionBatch, KvCache


def paged_attention(
    q: torch.Tensor,  # [tokens, heads, head_dim] float32
    k: torch.Tensor,  # [tokens, kv_heads, head_dim] float32
    v: torch.Tensor,  # [tokens, kv_heads, head_dim] float32
    cache: KvCache,
    batch: AttentionBatch,
    layer: int,
    scale: float,
) -> torch.Tensor:  # [tokens, heads * head_dim] float32
    """Store k and v in the cache and return causal attention softmax(scale * q k^T) v."""
    blocks = batch.slot_mapping // cache.block_tokens
    groups = batch.slot_mapping % cache.block_tokens // GROUP_TOKENS
    offsets = batch.slot_mapping % GROUP_TOKENS
    cache.keys[layer, blocks, :, groups, :, offsets] = k
    cache.values[layer, blocks, :, groups, offsets] = v
    out = torch.empty_like(q)
    group = q.shape[1] // k.shape[1]
    for index in range(batch.seq_len.numel()):
        start, stop = int(batch.query_start[index]), int(batch.query_start[index + 1])
        length = int(batch.seq_len[index])
        table = batch.block_table[index, : -(-length // cache.block_tokens)].long()
        keys = _gather(cache.keys[layer, table].transpose(-1, -2), length).repeat_interleave(group, 0)
        values = _gather(cache.values[layer, table], length).repeat_interleave(group, 0)
        scores = torch.einsum("thd,hpd->htp", q[start:stop], keys) * scale
        positions = torch.arange(length - (stop - start), length)
        future = torch.arange(length)[None, :] > positions[:, None]
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        out[start:stop] = torch.einsum("htp,hpd->thd", weights, values)
    return out.flatten(1)


def _gather(blocks: torch.Tensor, length: int) -> torch.Tensor:
    # [blocks, kv_heads, groups, GROUP_TOKENS, head_dim] -> [kv_heads, length, head_dim]
    return blocks.transpose(0, 1).flatten(1, 3)[:, :length]
