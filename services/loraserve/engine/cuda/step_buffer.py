"""A step's integers on the device: packed on the host into one buffer, sent in one copy, and read through views."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from loraserve.engine.compute.packed import PackedStep

NONE = -1
"""In ``source``: the token is known; in ``slots``: no adapter; in ``kv_slots``: the KV is not kept."""


@dataclass(frozen=True)
class BufferSize:
    """The room of a StepBuffer; ``blocks`` is the width of the block table, ``sampled`` the number of sampled rows."""

    tokens: int
    sequences: int
    blocks: int
    sampled: int

    def view_lengths(self) -> tuple[int, ...]:
        per_token = (self.tokens,) * 5
        return (*per_token, self.sequences + 1, self.sequences, self.sequences * self.blocks, self.sampled)


class StepBuffer:
    """int32 views of one device buffer. Their addresses never change, so that captured graphs can read them.

    ``tokens``, ``source``, ``positions``, ``slots``, ``kv_slots`` [tokens]; ``query_start`` [sequences + 1];
    ``seq_len`` [sequences]; ``table`` [sequences, blocks]; ``sampled`` [sampled]. ``source`` is the token's row among
    those that the preceding step sampled, or NONE if ``tokens`` holds the token.
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

        Room that the step does not use is filled with sequences of one token that read and write no memory. In a step
        with unused room every sequence must have one token, as in the decode steps that graphs are captured for.
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
