"""A step's integers on the device: packed on the host into one buffer, sent in one copy, and read through views."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from loraserve.engine.compute.runner import PackedStep
from loraserve.kernels.attention.gpu import GpuAttentionBatch

UNKNOWN = -1


@dataclass(frozen=True)
class StepShape:
    """Room for ``tokens`` in ``sequences``, ``blocks`` in the widest row of the table and ``sampled`` rows."""

    tokens: int
    sequences: int
    blocks: int
    sampled: int

    def sizes(self) -> tuple[int, ...]:
        per_token = (self.tokens,) * 5
        return (*per_token, self.sequences + 1, self.sequences, self.sequences * self.blocks, self.sampled)


class StepBuffer:
    """int32 views of one device buffer, whose addresses stay, so that a captured graph can read them.

    ``tokens``, ``source``, ``positions``, ``slots``, ``kv_slots`` [tokens]; ``query_start`` [sequences + 1];
    ``seq_len`` [sequences]; ``table`` [sequences, blocks]; ``sampled``. ``source`` is the row of the last step's drawn
    tokens that a token is, or UNKNOWN where ``tokens`` says it.
    """

    def __init__(self, shape: StepShape, device: torch.device) -> None:
        self.shape = shape
        self._sizes = shape.sizes()
        self._memory = torch.zeros(sum(self._sizes), dtype=torch.int32, device=device)
        views = torch.split(self._memory, list(self._sizes))
        self.tokens, self.source, self.positions, self.slots, self.kv_slots = views[:5]
        self.query_start, self.seq_len, table, self.sampled = views[5:]
        self.table = table.view(shape.sequences, shape.blocks)

    def send(self, packed: PackedStep, source: NDArray[np.int32]) -> None:
        """Does not wait for the copy. What is left of the room is filled with tokens that touch nothing.

        With room to spare every sequence has one token, as in the decode steps that graphs are captured for.
        """
        memory = torch.empty(len(self._memory), dtype=torch.int32, pin_memory=self._memory.is_cuda)
        self._fill(memory.numpy(), packed, source)
        self._memory.copy_(memory, non_blocking=True)

    def _fill(self, memory: NDArray[np.int32], packed: PackedStep, source: NDArray[np.int32]) -> None:
        parts = np.split(memory, np.cumsum(self._sizes)[:-1])
        tokens, from_row, positions, slots, kv_slots, query_start, seq_len, table, sampled = parts
        used, sequences = len(packed.tokens), len(packed.seq_len)
        for part, values, rest in (
            (tokens, packed.tokens, 0),
            (from_row, source, UNKNOWN),
            (positions, packed.positions, 0),
            (slots, packed.slots, UNKNOWN),
            (kv_slots, packed.kv_slots, UNKNOWN),
            (seq_len, packed.seq_len, 1),
        ):
            part[: len(values)] = values
            part[len(values) :] = rest
        query_start[: sequences + 1] = packed.query_start
        query_start[sequences + 1 :] = used + 1 + np.arange(len(query_start) - sequences - 1)
        rows = table.reshape(self.shape.sequences, self.shape.blocks)
        rows[:] = 0
        rows[:sequences, : packed.table.shape[1]] = packed.table
        sampled[: len(packed.sampled)] = packed.sampled
        sampled[len(packed.sampled) :] = used + np.arange(len(sampled) - len(packed.sampled))


def eager_step(
    packed: PackedStep, source: NDArray[np.int32], device: torch.device
) -> tuple[StepBuffer, GpuAttentionBatch]:
    """A step with exactly the room that it takes, on its way to the device."""
    sequences, blocks = packed.table.shape
    step = StepBuffer(StepShape(len(packed.tokens), sequences, blocks, len(packed.sampled)), device)
    step.send(packed, source)
    queries, lengths = tuple(packed.queries.tolist()), tuple(packed.seq_len.tolist())
    return step, GpuAttentionBatch(step.query_start, step.seq_len, step.table, queries, lengths)
