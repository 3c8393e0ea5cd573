"""Operands of paged attention on the CPU: the KV cache, and the sequences of a step with their KV blocks."""

from dataclasses import dataclass, field

import torch

from loraserve.model_shape import ModelShape

GROUP_TOKENS = 16
"""The CPU kernel computes the scores of this many keys at once. Block sizes are multiples of it."""


class KvCache:
    """Keys and values of all layers, float32, stored in groups of 16 consecutive tokens.

    ``keys`` is [layers, blocks, kv_heads, groups, head_dim, 16], ``values`` [layers, blocks, kv_heads, groups, 16,
    head_dim]. A vector load reads one dimension of several keys. Each vector lane then sums the score of one key.
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
    """Return the bytes that one block takes for keys and values in all layers."""
    return 2 * 4 * shape.layers * shape.kv_heads * block_tokens * shape.head_dim


@dataclass(frozen=True)
class AttentionBatch:
    """The sequences of one step. It is built once per step, and every layer uses it.

    ``query_start`` int32 [sequences + 1] holds the index of each sequence's first query token and, last, the total.
    ``seq_len`` int32 [sequences] counts a sequence's KV tokens, including this step's. ``block_table`` is int32
    [sequences, blocks]. ``slot_mapping`` int64 [tokens] is block * block_tokens + offset of each new token's KV. Of a
    sequence's n query tokens, token j has position seq_len - n + j. ``scores`` counts one query head's scores.
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
