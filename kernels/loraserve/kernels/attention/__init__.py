"""Paged attention over the KV cache, for prefill chunks and decode tokens in one call."""

from loraserve.kernels.attention.batch import AttentionBatch
from loraserve.kernels.attention.cpu import paged_attention, warm_up
from loraserve.kernels.attention.kv import GROUP_TOKENS, KvCache, block_bytes

__all__ = ["GROUP_TOKENS", "AttentionBatch", "KvCache", "block_bytes", "paged_attention", "warm_up"]
