"""A step's sequences as arrays, one token after the other: the input of a model on any device."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loraserve.engine.schedule.events import SequenceStep

Int32s = NDArray[np.int32]


@dataclass(frozen=True)
class PackedStep:
    """int32 arrays, packed sequence after sequence.

    Per token: ``tokens``, ``positions``, ``slots`` (the adapter's, -1 for none), and ``kv_slots`` (block *
    block_tokens + offset: where its KV is kept). Per sequence: ``seq_len`` (its KV including this step's tokens),
    ``table`` [sequences, blocks of the longest], and ``query_start``, with one more entry for the end. ``sampled``:
    the rows whose logits are needed.
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
    """Return the arrays of a step with at least one sequence. PENDING_TOKEN stays in ``tokens``."""
    lengths = np.array([len(s.tokens) for s in sequences], dtype=np.int32)
    starts = np.array([s.start for s in sequences], dtype=np.int32)
    query_start = np.zeros(len(sequences) + 1, dtype=np.int32)
    np.cumsum(lengths, out=query_start[1:])
    total = int(query_start[-1])
    tokens = np.fromiter((token for s in sequences for token in s.tokens), dtype=np.int32, count=total)
    # A token's position is its index in the packed batch, shifted from its sequence's first index to ``start``.
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
