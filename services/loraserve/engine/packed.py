"""A step's sequences as arrays, token after token: what a model is fed, on whatever device."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loraserve.engine.batch import SequenceStep

Int32s = NDArray[np.int32]


@dataclass(frozen=True)
class PackedStep:
    """All int32, packed sequence after sequence.

    Per token: ``tokens``, ``positions``, ``slots`` (the adapter's, -1 for none), ``kv_slots`` (block * block_tokens +
    offset, where its KV is kept). Per sequence: ``seq_len`` (its KV with this step's tokens), ``table``
    [sequences, most blocks], and ``query_start`` with one more for the end. ``sampled``: rows whose logits are wanted.
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
        """Tokens of each sequence."""
        return np.diff(self.query_start)


def pack(sequences: Sequence[SequenceStep], block_tokens: int) -> PackedStep:
    """``sequences`` is not empty. A token that is not known here keeps its placeholder."""
    lengths = np.array([len(s.tokens) for s in sequences], dtype=np.int32)
    starts = np.array([s.start for s in sequences], dtype=np.int32)
    query_start = np.zeros(len(sequences) + 1, dtype=np.int32)
    np.cumsum(lengths, out=query_start[1:])
    total = int(query_start[-1])
    tokens = np.fromiter((token for s in sequences for token in s.tokens), dtype=np.int32, count=total)
    # Position of each token: its index in the packed batch, moved from where its sequence begins to ``start``.
    positions = np.arange(total, dtype=np.int32) + np.repeat(starts - query_start[:-1], lengths)
    table = np.zeros((len(sequences), max(len(s.blocks) for s in sequences)), dtype=np.int32)
    for row, sequence in zip(table, sequences, strict=True):
        row[: len(sequence.blocks)] = sequence.blocks
    of_token = np.repeat(np.arange(len(sequences)), lengths)
    blocks = table[of_token, positions // block_tokens]
    return PackedStep(
        tokens=tokens,
        positions=positions,
        slots=np.array([s.slot for s in sequences], dtype=np.int32)[of_token],
        kv_slots=blocks * block_tokens + positions % block_tokens,
        query_start=query_start,
        seq_len=starts + lengths,
        table=table,
        sampled=query_start[1:][np.array([s.sample for s in sequences], dtype=np.bool_)] - 1,
    )
