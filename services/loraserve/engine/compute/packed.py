"""Packs the sequences of a step into flat arrays, the model's input on every device."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loraserve.engine.schedule.events import SequenceStep

Int32s = NDArray[np.int32]


@dataclass(frozen=True)
class PackedStep:
    """A step as int32 arrays.

    Arrays with one entry per token are ``tokens``, ``positions``, ``slots`` (adapter slot, -1 for none) and
    ``kv_slots`` (block * block_tokens + offset of its KV). ``seq_len`` [sequences] is the KV length including this
    step. ``table`` [sequences, blocks of the longest] holds KV block ids. ``query_start`` [sequences + 1] is the
    cumulative token count. ``sampled`` holds the token indices whose logits are needed.
    """

    tokens: Int32s
    positions: Int32s
    slots: Int32s
    kv_slots: Int32s
    query_start: Int32s
    seq_len: Int32s
    table: Int32s
    sampled: Int32s

    @property
    def queries(self) -> Int32s:
        return np.diff(self.query_start)


def pack_step(sequences: Sequence[SequenceStep], block_tokens: int) -> PackedStep:
    """Pack at least one sequence. The caller must resolve PENDING_TOKEN, which stays in ``tokens``."""
    lengths = np.array([len(s.tokens) for s in sequences], dtype=np.int32)
    starts = np.array([s.start for s in sequences], dtype=np.int32)
    query_start = np.zeros(len(sequences) + 1, dtype=np.int32)
    np.cumsum(lengths, out=query_start[1:])
    total = int(query_start[-1])
    tokens = np.fromiter((token for s in sequences for token in s.tokens), dtype=np.int32, count=total)
    # position = start + index in the sequence = start + packed index - query_start
    positions = np.arange(total, dtype=np.int32) + np.repeat(starts - query_start[:-1], lengths)
    table = np.zeros((len(sequences), max(len(s.blocks) for s in sequences)), dtype=np.int32)
    for row, sequence in zip(table, sequences, strict=True):
        row[: len(sequence.blocks)] = sequence.blocks
    sequence_of = np.repeat(np.arange(len(sequences)), lengths)
    blocks = table[sequence_of, positions // block_tokens]
    return PackedStep(
        tokens=tokens,
        positions=positions,
        slots=np.array([s.slot for s in sequences], dtype=np.int32)[sequence_of],
        kv_slots=blocks * block_tokens + positions % block_tokens,
        query_start=query_start,
        seq_len=starts + lengths,
        table=table,
        sampled=query_start[1:][np.array([s.sample for s in sequences], dtype=np.bool_)] - 1,
    )
