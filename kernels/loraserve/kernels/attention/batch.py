"""Which query tokens of a step attend to which blocks: planned once, reused by every layer."""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class AttentionBatch:
    """Sequences of a step, one after the other.

    ``query_start`` int32 [sequences + 1]: where each one's query tokens begin; ``seq_len`` int32 [sequences]: tokens in
    its KV including this step's; ``block_table`` int32 [sequences, most blocks]; ``slot_mapping`` int64 [tokens]:
    block * block_tokens + offset at which each of this step's tokens is kept. Query token j of a sequence with n query
    tokens has the absolute position seq_len - n + j. ``scores``: pairs of a query token and a position in its past.
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
        past = 2 * self.seq_len.long() - queries + 1
        object.__setattr__(self, "scores", int((queries * past).sum()) // 2)

    @property
    def sequences(self) -> int:
        return self.seq_len.numel()
