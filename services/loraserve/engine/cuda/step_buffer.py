"""Sends the integer inputs of a step to the device in one copy. Views of one buffer give access to each input."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from loraserve.engine.compute.packed import PackedStep

NONE = -1
"""Means a known token in ``source``, no adapter in ``slots``, and KV that is not stored in ``kv_slots``."""


@dataclass(frozen=True)
class BufferSize:
    """Capacity of a StepBuffer. ``blocks`` is the block table's width, ``sampled`` the number of sampled rows."""

    tokens: int
    sequences: int
    blocks: int
    sampled: int

    def view_lengths(self) -> tuple[int, ...]:
        per_token = (self.tokens,) * 5
        return (*per_token, self.sequences + 1, self.sequences, self.sequences * self.blocks, self.sampled)


class StepBuffer:
    """int32 views of one device buffer. Captured graphs can read them, because their addresses never change.

    ``tokens``, ``source``, ``positions``, ``slots`` and ``kv_slots`` are [tokens], ``query_start`` is [sequences + 1],
    ``seq_len`` is [sequences], ``table`` is [sequences, blocks], and ``sampled`` is [sampled]. ``source`` is a pending
    token's row among the preceding step's sampled tokens. It is NONE if ``tokens`` holds the token.
    """

    def __init__(self, size: BufferSize, device: torch.device) -> None:
        self.size = size
        self._lengths = size.view_lengths()
        self._memory = torch.zeros(sum(self._lengths), dtype=torch.int32, device=device)
        views = torch.split(self._memory, list(self._lengths))
        self.tokens, self.source, self.positions, self.slots, self.kv_slots = views[:5]
        self.query_start, self.seq_len, table, self.sampled = views[5:]
        self.table = table.view(size.sequences, size.blocks)

    def send(self, packed: PackedStep, source: NDArray[np.int32]) -> None:
        """Copy a step to the device without waiting for the copy.

        Unused capacity is filled with dummy sequences of one token, which use no adapter and store no KV. This works
        only for decode steps, in which every sequence has one token. Other steps must fill the buffer exactly.
        """
        memory = torch.empty(len(self._memory), dtype=torch.int32, pin_memory=self._memory.is_cuda)
        self._fill(memory.numpy(), packed, source)
        self._memory.copy_(memory, non_blocking=True)

    def _fill(self, memory: NDArray[np.int32], packed: PackedStep, source: NDArray[np.int32]) -> None:
        parts = np.split(memory, np.cumsum(self._lengths)[:-1])
        tokens, source_part, positions, slots, kv_slots, query_start, seq_len, table, sampled = parts
        used, sequences = len(packed.tokens), len(packed.seq_len)
        for part, values, padding in (
            (tokens, packed.tokens, 0),
            (source_part, source, NONE),
            (positions, packed.positions, 0),
            (slots, packed.slots, NONE),
            (kv_slots, packed.kv_slots, NONE),
            (seq_len, packed.seq_len, 1),
        ):
            part[: len(values)] = values
            part[len(values) :] = padding
        query_start[: sequences + 1] = packed.query_start
        query_start[sequences + 1 :] = used + 1 + np.arange(len(query_start) - sequences - 1)
        rows = table.reshape(self.size.sequences, self.size.blocks)
        rows[:] = 0
        rows[:sequences, : packed.table.shape[1]] = packed.table
        sampled[: len(packed.sampled)] = packed.sampled
        sampled[len(packed.sampled) :] = used + np.arange(len(sampled) - len(packed.sampled))
