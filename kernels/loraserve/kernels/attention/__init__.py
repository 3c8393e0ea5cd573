"""Paged causal attention over the KV cache, for prefill chunks and decode tokens in one call.

The package exports the CPU implementation. gpu.py is the implementation for CUDA. reference.py defines the results.
"""

from loraserve.kernels.attention.batch import GROUP_TOKENS, AttentionBatch, KvCache, block_bytes
from loraserve.kernels.attention.cpu import paged_attention, warm_up

__all__ = ["GROUP_TOKENS", "AttentionBatch", "KvCache", "block_bytes", "paged_attention", "warm_up"]
