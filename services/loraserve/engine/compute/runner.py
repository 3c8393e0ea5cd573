"""Model runner for the CPU: turns a StepBatch into tensors, computes the logits and samples tokens."""

import mmap
import time
from collections.abc import Callable
from pathlib import Path

import torch

from loraserve.adapter.format import ITEM_BYTES, SlabHeader
from loraserve.config import EngineConfig
from loraserve.engine.compute.protocol import ComputedStep, pack_step
from loraserve.engine.compute.sampler import sample
from loraserve.engine.loading.arrival import Arrival, Gate, late_requests, make_gate
from loraserve.engine.loading.memory import HostPool, check_slab, populate
from loraserve.engine.model.config import DecoderConfig, context_limit, read_decoder_config
from loraserve.engine.model.decoder import Decoder, StepInputs
from loraserve.engine.model.linear import CpuWeightForm, pick_backend
from loraserve.engine.model.weights import load_weights
from loraserve.engine.schedule.events import SequenceStep, StepBatch, StepResult
from loraserve.errors import ConfigError
from loraserve.kernels import attention, linear, lora
from loraserve.kernels.fused import cpu as fused
from loraserve.messages.sampling import SamplingParams
from loraserve.transfer.shm import SharedMemory, is_supported

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class CpuRunner:
    """A LayeredRunner on the CPU. ``submit`` computes the step before it returns, so no steps run ahead.

    One thread calls ``submit``, ``step``, ``logits`` and ``warm_up``. `Runner` says what other threads may call.
    """

    def __init__(self, model_dir: Path, engine: EngineConfig, threads: int, progress: Callable[[str], None]) -> None:
        """Load the weights and allocate the memory. Raises ConfigError if a setting, field or tensor is invalid."""
        self.steps_ahead = 0
        self._arrivals: dict[int, Arrival] = {}
        self._threads = threads
        torch.set_num_threads(threads)
        config = read_decoder_config(model_dir)
        self.shape = config.shape
        self.eos_token_ids = config.eos_token_ids
        self.block_tokens = engine.block_tokens
        self.kv_blocks = _count_kv_blocks(config, engine)
        self.max_positions = context_limit(config, progress)
        self.slab_dtype = engine.slab_dtype
        self.pool_elements = _count_pool_elements(engine)
        self.weights_backend = pick_backend(engine.weights)
        memory, shared = _allocate_pool(max(engine.pool_bytes, mmap.PAGESIZE))
        populate(memory)
        self.pool = HostPool(memory[: self.pool_elements * ITEM_BYTES[engine.slab_dtype]], shared)
        self._tables = lora.AdapterTables(config.shape, engine.max_adapters)
        self._decoder = Decoder(
            config=config,
            weights=load_weights(model_dir, config, CpuWeightForm(self.weights_backend), progress),
            cache=attention.KvCache(config.shape, self.kv_blocks, engine.block_tokens),
            pool=torch.frombuffer(memory, dtype=DTYPES[engine.slab_dtype], count=self.pool_elements),
            tables=self._tables,
            positions=min(self.max_positions, self.kv_blocks * engine.block_tokens),
        )

    def warm_up(self) -> None:
        """Prepare the kernels and run two trial steps, so that the first request is not slow."""
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
        if self._arrivals.pop(slot, None) is None:
            check_slab(header, self.slab_dtype, base_elements, self.pool_elements)
            self._tables.install(slot, header, base_elements)

    def arrive(self, slot: int, header: SlabHeader, base_elements: int, arrival: Arrival) -> None:
        if slot not in self._arrivals:
            self.install(slot, header, base_elements)
        self._arrivals[slot] = arrival

    def remove(self, slot: int) -> None:
        self._arrivals.pop(slot, None)
        self._tables.remove(slot)

    def submit(self, batch: StepBatch) -> ComputedStep:
        return ComputedStep(self.step(batch))

    def step(self, batch: StepBatch) -> StepResult:
        """Compute one step and sample its tokens. ``duration_s`` of the result includes sampling."""
        started_s = time.monotonic()
        rows = [sequence for sequence in batch.sequences if sequence.sample]
        gate = make_gate(batch, self._arrivals)
        logits = self.logits(batch, gate).numpy()
        sampled = tuple(sample(logits, rows, self.eos_token_ids))
        late = late_requests(batch, gate)
        return StepResult(step_id=batch.step_id, sampled=sampled, duration_s=time.monotonic() - started_s, late=late)

    def logits(self, batch: StepBatch, gate: Gate | None = None) -> torch.Tensor:
        """Write the KV of all tokens and return float32 logits [sequences with ``sample``, vocab]."""
        if torch.get_num_threads() != self._threads:  # torch stores this number per thread
            torch.set_num_threads(self._threads)
        with torch.inference_mode():
            return self._decoder.forward(_make_inputs(batch.sequences, self.block_tokens), gate)


def _allocate_pool(length_bytes: int) -> tuple[memoryview, SharedMemory | None]:
    """Return memory for the pool. It is shared memory, which local peers can map, if the system supports that."""
    if is_supported():
        shared = SharedMemory(length_bytes)
        return shared.view, shared
    return memoryview(mmap.mmap(-1, length_bytes)), None


def _count_pool_elements(engine: EngineConfig) -> int:
    elements = engine.pool_bytes // ITEM_BYTES[engine.slab_dtype]
    if elements < 1:
        raise ConfigError(f"engine.pool_bytes={engine.pool_bytes} holds no adapter; give room for several")
    return elements


def _count_kv_blocks(config: DecoderConfig, engine: EngineConfig) -> int:
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


def _make_inputs(sequences: tuple[SequenceStep, ...], block_tokens: int) -> StepInputs:
    packed = pack_step(sequences, block_tokens)
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
