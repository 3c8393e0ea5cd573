"""The interface of model runners, the threads that run them, and the packing of a step into arrays."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from loraserve.adapter.format import SlabHeader
from loraserve.engine.loading.memory import PoolMemory
from loraserve.engine.schedule.events import SequenceStep, StepBatch, StepResult


class DeviceLostError(Exception):
    """The device is unusable in this process. Only a new process can use it again."""


class PendingStep(Protocol):
    def result(self) -> StepResult:
        """Wait for the result. A failed step raises its error; DeviceLostError means that all later steps fail too."""
        ...


class ComputedStep(msgspec.Struct, frozen=True):
    """A PendingStep that is already complete."""

    step: StepResult

    def result(self) -> StepResult:
        return self.step


class Runner(Protocol):
    """The model on one device, with its KV cache and its adapter pool.

    One thread calls ``submit``. The same or another thread calls ``result`` of the returned steps in order. A third
    thread may call ``install`` and ``remove`` for slots that no step in flight uses. A fourth thread may write to
    those extents of ``pool`` that no step in flight reads.
    """

    @property
    def steps_ahead(self) -> int:
        """Number of further steps accepted while one runs. The runner replaces PENDING_TOKEN by the sampled token."""
        ...

    @property
    def kv_blocks(self) -> int: ...

    @property
    def max_positions(self) -> int: ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    @property
    def weights_backend(self) -> str: ...

    def submit(self, batch: StepBatch) -> PendingStep:
        """Start a step, which runs after all earlier steps. May raise the same errors as ``PendingStep.result``.

        Except after DeviceLostError, a failed step does not make later steps fail. If PENDING_TOKEN refers to a failed
        step, the runner may use any token, because the engine discards the result.
        """
        ...

    @property
    def pool(self) -> PoolMemory: ...

    def install(self, slot: int, header: SlabHeader, base_elements: int) -> None:
        """Make later steps use the slab at element ``base_elements`` of the pool for tokens of ``slot``.

        Raises ValueError if the slab does not fit the model or the settings.
        """
        ...

    def remove(self, slot: int) -> None:
        """Make later steps compute tokens of ``slot`` without an adapter."""
        ...


T = TypeVar("T")


class StepExecutor:
    """Submits steps in one thread. If the runner accepts steps ahead, a second thread waits for their results."""

    def __init__(self) -> None:
        self._compute = ThreadPoolExecutor(max_workers=1, thread_name_prefix="step")
        self._wait = ThreadPoolExecutor(max_workers=1, thread_name_prefix="result")

    def call(self, function: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._compute, function, *arguments)

    def submit(self, runner: Runner, batch: StepBatch) -> asyncio.Future[StepResult]:
        """Submit a step, which runs after all earlier steps. Returns a future of its result."""
        if not runner.steps_ahead:
            return self.call(lambda: runner.submit(batch).result())
        submitted = self._compute.submit(runner.submit, batch)
        return asyncio.get_running_loop().run_in_executor(self._wait, lambda: submitted.result().result())

    def close(self) -> None:
        for executor in (self._compute, self._wait):
            executor.shutdown(wait=True, cancel_futures=True)


Int32s = NDArray[np.int32]


@dataclass(frozen=True)
class PackedStep:
    """A step as int32 arrays.

    Arrays with one entry per token are ``tokens``, ``positions``, ``slots`` (adapter slot, -1 for none) and
    ``kv_slots`` (block * block_tokens + offset of its KV). ``seq_len`` [sequences] is the KV length including this
    step. ``table`` [sequences, most blocks of a sequence] holds KV block ids. ``query_start`` [sequences + 1] is the
    cumulative token count. ``sampled`` holds the indices of the tokens whose logits are needed.
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
    """Pack one or more sequences. PENDING_TOKEN is copied to ``tokens``, where the caller must replace it."""
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
