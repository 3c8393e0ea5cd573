"""A step's sequences as arrays, token after token: what a model is fed, on whatever device."""

import mmap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from loraserve.adapter.format import ITEM_BYTES, SlabHeader
from loraserve.config import EngineConfig
from loraserve.engine.compute.protocol import ComputedStep
from loraserve.engine.compute.sampler import sample
from loraserve.engine.loading.arrival import Arrival, Gate, gate_of, late_of
from loraserve.engine.loading.memory import HostPool, check_slab, populate
from loraserve.engine.model.config import DecoderConfig, context_limit, read_decoder_config
from loraserve.engine.model.decoder import Decoder, StepInputs
from loraserve.engine.model.linear import HostForm, pick_backend
from loraserve.engine.model.weights import load_weights
from loraserve.engine.schedule.events import PENDING_TOKEN, SequenceStep, StepBatch, StepResult
from loraserve.errors import ConfigError
from loraserve.kernels import attention, linear, lora
from loraserve.kernels.fused import cpu as fused
from loraserve.messages.sampling import SamplingParams
from loraserve.transfer.shm import SharedMemory, is_supported

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


# MERGED: loraserve.engine.compute.runner
# """Owns what a step computes with: weights, KV cache, adapter pool. Turns a StepBatch into tensors and into tokens."""


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ModelRunner:
    """The model on this machine's CPU.

    ``submit``, ``step``, ``logits`` and ``warm_up`` belong to one thread. ``install`` and ``remove`` may be called from
    another for slots that no step in flight uses, and ``pool`` may be written by another outside the extents in
    use. ``submit`` computes at once, so that steps ahead would bring nothing; they are computed all the same.
    """

    def __init__(self, model_dir: Path, engine: EngineConfig, threads: int, progress: Callable[[str], None]) -> None:
        """Loads the weights; raises ConfigError naming the setting, field or tensor at fault."""
        self.steps_ahead = 0
        self._drawn: dict[str, int] = {}
        self._arrivals: dict[int, Arrival] = {}
        self._threads = threads
        torch.set_num_threads(threads)
        config = read_decoder_config(model_dir)
        self.shape = config.shape
        self.eos_token_ids = config.eos_token_ids
        self.block_tokens = engine.block_tokens
        self.kv_blocks = _kv_blocks(config, engine)
        self.max_positions = context_limit(config, progress)
        self.slab_dtype = engine.slab_dtype
        self.pool_elements = _pool_elements(engine)
        self.weights_backend = pick_backend(engine.weights)
        memory, shared = _pool_memory(max(engine.pool_bytes, mmap.PAGESIZE))
        populate(memory)
        self.pool = HostPool(memory[: self.pool_elements * ITEM_BYTES[engine.slab_dtype]], shared)
        self._tables = lora.AdapterTables(config.shape, engine.max_adapters)
        self._decoder = Decoder(
            config,
            load_weights(model_dir, config, HostForm(self.weights_backend), progress),
            attention.KvCache(config.shape, self.kv_blocks, engine.block_tokens),
            torch.frombuffer(memory, dtype=DTYPES[engine.slab_dtype], count=self.pool_elements),
            self._tables,
            min(self.max_positions, self.kv_blocks * engine.block_tokens),
        )

    def warm_up(self) -> None:
        """Compiles or loads the kernels and touches the weights, so that the first request waits for neither."""
        attention.warm_up()
        fused.warm_up()
        lora.warm_up(DTYPES[self.slab_dtype])
        linear.warm_up()
        sampling = SamplingParams(max_tokens=1, temperature=0.0)
        for tokens in ((0,), (0, 0)):
            sequence = SequenceStep(
                request_id="", tokens=tokens, start=0, blocks=(0,), sampling=sampling, prompt_length=1
            )
            self.step(StepBatch(step_id=0, sequences=(sequence,)))

    def install(self, slot: int, header: SlabHeader, base_elements: int) -> None:
        """Tokens of ``slot`` use the slab that lies at ``base_elements`` of the pool from now on.

        Raises ValueError where the slab is of another dtype or model, or would not end within the pool.
        """
        if self._arrivals.pop(slot, None) is None:
            check_slab(header, self.slab_dtype, base_elements, self.pool_elements)
            self._tables.install(slot, header, base_elements)

    def arrive(self, slot: int, header: SlabHeader, base_elements: int, arrival: Arrival) -> None:
        """See LayeredRunner. Raises as ``install``."""
        if slot not in self._arrivals:
            self.install(slot, header, base_elements)
        self._arrivals[slot] = arrival

    def remove(self, slot: int) -> None:
        """Tokens of ``slot`` compute as the base model from now on."""
        self._arrivals.pop(slot, None)
        self._tables.remove(slot)

    def submit(self, batch: StepBatch) -> ComputedStep:
        """The step, done."""
        return ComputedStep(self.step(batch))

    def step(self, batch: StepBatch) -> StepResult:
        """Compute one step and draw the tokens that are due. ``duration_s`` covers all of it."""
        started_s = time.monotonic()
        batch = _resolved(batch, self._drawn)
        rows = [sequence for sequence in batch.sequences if sequence.sample]
        gate = gate_of(batch, self._arrivals)
        logits = self.logits(batch, gate).numpy()
        sampled = tuple(sample(logits, rows, self.eos_token_ids))
        self._drawn = {s.request_id: s.token for s in sampled}
        late = late_of(batch, gate)
        return StepResult(step_id=batch.step_id, sampled=sampled, duration_s=time.monotonic() - started_s, late=late)

    def logits(self, batch: StepBatch, gate: Gate | None = None) -> torch.Tensor:
        """Writes the KV of all tokens; float32 logits [sequences with ``sample``, vocab] in their order."""
        if torch.get_num_threads() != self._threads:  # it is kept per thread
            torch.set_num_threads(self._threads)
        with torch.inference_mode():
            return self._decoder.forward(_inputs(batch.sequences, self.block_tokens), gate)


def _pool_memory(length_bytes: int) -> tuple[memoryview, SharedMemory | None]:
    """Such as peers on this machine can map, where it can."""
    if is_supported():
        shared = SharedMemory(length_bytes)
        return shared.view, shared
    return memoryview(mmap.mmap(-1, length_bytes)), None


def _pool_elements(engine: EngineConfig) -> int:
    elements = engine.pool_bytes // ITEM_BYTES[engine.slab_dtype]
    if elements < 1:
        raise ConfigError(f"engine.pool_bytes={engine.pool_bytes} holds no adapter; give room for several")
    return elements


def _kv_blocks(config: DecoderConfig, engine: EngineConfig) -> int:
    if engine.block_tokens % attention.GROUP_TOKENS:
        raise ConfigError(
            f"engine.block_tokens is {engine.block_tokens}, it must be a multiple of {attention.GROUP_TOKENS}"
        )
    block_bytes = attention.block_bytes(config.shape, engine.block_tokens)
    blocks = engine.kv_bytes // block_bytes
    if blocks < 1:
        raise ConfigError(
            f"engine.kv_bytes={engine.kv_bytes} holds not one block of {engine.block_tokens} tokens; "
            f"give at least {block_bytes}, better a hundred times that"
        )
    return blocks


def _resolved(batch: StepBatch, drawn: Mapping[str, int]) -> StepBatch:
    """The batch with the tokens that PENDING_TOKEN stands for; any token where the step before it failed."""
    sequences = tuple(
        msgspec.structs.replace(s, tokens=(drawn.get(s.request_id, 0),)) if s.tokens[0] == PENDING_TOKEN else s
        for s in batch.sequences
    )
    return msgspec.structs.replace(batch, sequences=sequences)


def _inputs(sequences: tuple[SequenceStep, ...], block_tokens: int) -> StepInputs:
    packed = pack(sequences, block_tokens)
    return StepInputs(
        tokens=torch.from_numpy(packed.tokens).long(),
        positions=torch.from_numpy(packed.positions).long(),
        attention=attention.AttentionBatch(
            query_start=torch.from_numpy(packed.query_start),
            seq_len=torch.from_numpy(packed.seq_len),
            block_table=torch.from_numpy(packed.table),
            slot_mapping=torch.from_numpy(packed.kv_slots).long(),
        ),
        lora=lora.plan_batch(torch.from_numpy(packed.slots)),
        sampled_rows=torch.from_numpy(packed.sampled).long(),
    )
