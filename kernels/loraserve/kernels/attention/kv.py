"""The KV cache's memory. Its layout is the kernels' business."""

import torch

from loraserve.model_shape import ModelShape

GROUP_TOKENS = 16
"""Blocks hold a multiple of this many tokens: the CPU kernel scores that many keys at once."""


class KvCache:
    """Keys float32 [layers, blocks, kv_heads, groups, head_dim, 16] and values [..., groups, 16, head_dim].

    Keys of 16 neighbouring tokens lie side by side, so that their scores come out of vector code without sums over
    lanes. Both are allocated once; pages that no block was written to yet take no physical memory.
    """

    def __init__(self, shape: ModelShape, blocks: int, block_tokens: int = 16) -> None:
        if block_tokens % GROUP_TOKENS:
            raise ValueError(f"block_tokens is {block_tokens}, it must be a multiple of {GROUP_TOKENS}")
        self.shape = shape
        self.blocks = blocks
        self.block_tokens = block_tokens
        size = (shape.layers, blocks, shape.kv_heads, block_tokens // GROUP_TOKENS)
        self.keys = torch.empty(*size, shape.head_dim, GROUP_TOKENS, dtype=torch.float32)
        self.values = torch.empty(*size, GROUP_TOKENS, shape.head_dim, dtype=torch.float32)


def block_bytes(shape: ModelShape, block_tokens: int) -> int:
    """Memory of one block over all layers, keys and values."""
    return 2 * 4 * shape.layers * shape.kv_heads * block_tokens * shape.head_dim
