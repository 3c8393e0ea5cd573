"""Operands of paged attention on the CPU: the KV cache, and which query tokens of a step attend to which blocks."""

from dataclasses import dataclass, field

import torch

from loraserve.model_shape import ModelShape

GROUP_TOKENS = 16
"""A block holds a multiple of this many tokens: the CPU kernel scores so many keys at once."""


class KvCache:
    """Keys float32 [layers, blocks, kv_heads, groups, head_dim, 16] and values [..., groups, 16, head_dim].

    The keys of 16 neighbouring tokens are interleaved, so that vector code computes their scores without sums over
    lanes. Both tensors are allocated once; pages of blocks that were never written take no physical memory.
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
    """Return the memory of one block over all layers, keys and values."""
    return 2 * 4 * shape.layers * shape.kv_heads * block_tokens * shape.head_dim


@dataclass(frozen=True)
class AttentionBatch:
    """The sequences of a step, one after the other. Planned once per step and used by every layer.

    ``query_start`` int32 [sequences + 1]: where the query tokens of each sequence begin; ``seq_len`` int32 [sequences]:
    tokens in its KV, this step's included; ``block_table`` int32 [sequences, most blocks]; ``slot_mapping`` int64
    [tokens]: block * block_tokens + offset, where the KV of each of this step's tokens is stored. Query token j of a
    sequence with n query tokens has the absolute position seq_len - n + j. ``scores`` counts the pairs of a query token
    and a position it attends to.
    """

    query_start: torch.Tensor
    seq_len: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    scores: int = field(init=False)

    def __post_init__(self) -> None:
        for tensor in (self.query_start, self.seq_len, self.block_table):
            assert tensor.dtype == torch.int32, tensor.dtype
            assert tensor.is_contiguous(), tensor.stride()
        assert self.slot_mapping.dtype == torch.int64, self.slot_mapping.dtype
        assert self.slot_mapping.is_contiguous(), self.slot_mapping.stride()
        assert self.query_start.shape == (self.sequences + 1,), self.query_start.shape
        assert self.block_table.shape[0] == self.sequences, self.block_table.shape
        queries = self.query_start.diff().long()
        twice_mean_length = 2 * self.seq_len.long() - queries + 1
        object.__setattr__(self, "scores", int((queries * twice_mean_length).sum()) // 2)

    @property
    def sequences(self) -> int:
        return self.seq_len.numel()
