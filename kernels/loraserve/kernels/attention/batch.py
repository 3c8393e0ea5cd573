"""Which query tokens of a step attend to which blocks: planned once, reused by every layer."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionBatch:
    """Sequences of a step, one after the other.

    ``query_start`` int32 [sequences + 1]: where each one's query tokens begin; ``seq_len`` int32 [sequences]: tokens in
    its KV including this step's; ``block_table`` int32 [sequences, most blocks]; ``slot_mapping`` int64 [tokens]:
    block * block_tokens + offset at which each of this step's tokens is kept. Query token j of a sequence with n query
    tokens has the absolute position seq_len - n + j.
    """

    query_start: torch.Tensor
    seq_len: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
