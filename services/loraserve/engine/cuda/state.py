"""Allocates an engine's GPU memory: adapter tables, and a KV cache and adapter pool that share the memory left."""

import gc
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from loraserve.adapter.format import make_uniform_layout
from loraserve.config import EngineConfig
from loraserve.engine.compute.protocol import pack_step
from loraserve.engine.cuda.decoder import NONE, DecoderMemory, GpuDecoder, GpuStepInputs
from loraserve.engine.cuda.memory import (
    SHOWN_RANKS,
    DevicePool,
    MeasuredMemory,
    MemoryShares,
    describe_capacity,
    divide_memory,
)
from loraserve.engine.cuda.sampling import draw, prepare
from loraserve.engine.model.config import DecoderConfig
from loraserve.engine.model.linear import Linear
from loraserve.engine.model.weights import DecoderWeights
from loraserve.engine.schedule.events import SequenceStep
from loraserve.errors import ConfigError
from loraserve.kernels.attention.gpu import Backend, GpuKvCache, gpu_block_bytes, pick_backend
from loraserve.kernels.lora.tables import AdapterTables
from loraserve.kernels.lora.work import LoraWork, Workspace
from loraserve.messages.sampling import SamplingParams

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}
SLAB_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "float32": "float32"}
GRAPHS_BYTES = 512 << 20
"""Memory reserved for captured graphs and libraries, which are allocated after the memory is divided."""


class GpuWeightForm:
    """Converts weights for the GPU engine. Linear layers and the embedding have one dtype, norms are float32.

    Each tensor is rounded and moved to the device when it is read, so the host never holds the whole model.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device

    def embedding(self, weight: torch.Tensor) -> torch.Tensor:
        return self._move(weight)

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        return Linear(self._move(weight), None if bias is None else self._move(bias))

    def tied_head(self, embedding: torch.Tensor) -> Linear:
        return Linear(embedding, None)

    def vector(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.to(self._device)

    def _move(self, weight: torch.Tensor) -> torch.Tensor:
        moved = weight.to(self._device, self._dtype, copy=True)
        if self._dtype == torch.float16 and not bool(moved.isfinite().all()):
            raise ConfigError("engine.weights=fp16: the model has weights beyond 65504; use bf16 weights and slabs")
        return moved


def compute_dtype(engine: EngineConfig) -> str:
    """Return the key of DTYPES for the weights and the KV cache. "auto" means the dtype ``engine.slab_dtype``.

    Raises ConfigError if weights and adapters would have different dtypes, which the kernels do not support.
    """
    if engine.weights == "auto":
        return next(name for name, slab in SLAB_DTYPES.items() if slab == engine.slab_dtype)
    if SLAB_DTYPES[engine.weights] != engine.slab_dtype:
        raise ConfigError(
            f"engine.weights={engine.weights} needs engine.slab_dtype={SLAB_DTYPES[engine.weights]} on a GPU, it is "
            f"{engine.slab_dtype}; set both alike, or engine.weights=auto"
        )
    return engine.weights


@dataclass(frozen=True, kw_only=True)
class DeviceState:
    """The decoder and the memory of a CudaRunner. ``positions`` is the longest context in tokens."""

    config: DecoderConfig
    device: torch.device
    dtype: torch.dtype
    tables: AdapterTables
    space: Workspace
    pool: DevicePool
    decoder: GpuDecoder
    shares: MemoryShares
    positions: int
    attention: Backend
    block_tokens: int
    max_running: int

    def run_trial_step(self, tokens: int, work: LoraWork | None, context: int = 0) -> None:
        """Compute a step of ``tokens`` tokens and sample its rows, using only the first KV block.

        If ``context`` exceeds ``tokens``, the step computes the last tokens of one sequence of ``context`` tokens.
        Otherwise, the step's tokens are divided among several sequences.
        """
        rows = [self._trial_row(0, tokens, context - tokens)] if context > tokens else self._trial_rows(tokens)
        packed = pack_step(rows, self.block_tokens)
        inputs = GpuStepInputs.of_exact_size(packed, np.full(tokens, NONE, np.int32), work, self.device)
        logits = self.decoder.forward(inputs, torch.zeros(1, dtype=torch.int64, device=self.device))
        draw(logits, prepare(rows, self.config.shape.vocab, self.config.eos_token_ids, self.device))

    def _trial_rows(self, tokens: int) -> list[SequenceStep]:
        """Divide the tokens into up to ``max_running`` sequences, or more if one would exceed ``positions`` tokens."""
        count = max(min(self.max_running, tokens), -(-tokens // self.positions))
        return [self._trial_row(i, len(part)) for i, part in enumerate(np.array_split(np.arange(tokens), count))]

    def _trial_row(self, index: int, tokens: int, start: int = 0) -> SequenceStep:
        return SequenceStep(
            request_id=str(index),
            tokens=(0,) * tokens,
            start=start,
            blocks=(0,) * -(-(start + tokens) // self.block_tokens),
            sampling=SamplingParams(max_tokens=1, temperature=1.0, top_p=0.9),
            prompt_length=tokens,
        )


def allocate_state(
    config: DecoderConfig,
    weights: DecoderWeights,
    engine: EngineConfig,
    positions: int,
    progress: Callable[[str], None],
) -> DeviceState:
    """Allocate the KV cache, pool and tables on the weights' device. Raises ConfigError if memory is too small."""
    device, dtype = weights.embedding.device, weights.embedding.dtype
    attention, reason = pick_backend(config.shape, engine.block_tokens, dtype, device)
    progress(f"attention: {attention} ({reason})")
    tables = AdapterTables(config.shape, engine.max_adapters, str(device))
    space = Workspace(tables, engine.max_step_tokens, engine.max_rank, dtype)

    def make_state(shares: MemoryShares, positions: int) -> DeviceState:
        cache = GpuKvCache(config.shape, shares.kv_blocks, engine.block_tokens, dtype, device)
        pool = DevicePool(shares.pool_bytes // dtype.itemsize, dtype, device)
        memory = DecoderMemory(cache, pool.tensor, tables)
        return DeviceState(
            config=config,
            device=device,
            dtype=dtype,
            tables=tables,
            space=space,
            pool=pool,
            decoder=GpuDecoder(config, weights, memory, positions, attention),
            shares=shares,
            positions=positions,
            attention=attention,
            block_tokens=engine.block_tokens,
            max_running=engine.max_running,
        )

    block_bytes = gpu_block_bytes(config.shape, engine.block_tokens, dtype)
    if device.type == "cuda":
        trial = MemoryShares(kv_blocks=-(-engine.max_step_tokens // engine.block_tokens), pool_bytes=1 << 20)
        measured = _measure_memory(make_state(trial, positions), engine.max_step_tokens)
        shares = divide_memory(measured, engine.memory_fraction, engine.pool_fraction, block_bytes)
    else:
        shares = MemoryShares(kv_blocks=engine.kv_bytes // block_bytes, pool_bytes=engine.pool_bytes)
    if shares.kv_blocks < 1:
        raise ConfigError(f"engine.kv_bytes={engine.kv_bytes} holds not one block; give at least {block_bytes}")
    ranks = [rank for rank in SHOWN_RANKS if rank <= engine.max_rank]
    sizes = {rank: make_uniform_layout(config.shape, engine.slab_dtype, rank).slab_bytes for rank in ranks}
    progress(describe_capacity(shares, engine.block_tokens, engine.max_adapters, sizes))
    return make_state(shares, min(positions, shares.kv_blocks * engine.block_tokens))


def _measure_memory(state: DeviceState, tokens: int) -> MeasuredMemory:
    """Measure GPU memory while computing two large steps: one of many sequences, one of the longest context."""
    gc.collect()  # do not count memory of an earlier runner in this process
    with torch.inference_mode(), torch.cuda.device(state.device):
        work = LoraWork(state.tables, state.space, tokens)
        state.run_trial_step(tokens, work)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        free_bytes, total_bytes = torch.cuda.mem_get_info()
        state.run_trial_step(tokens, work)
        state.run_trial_step(tokens, work, context=state.positions)
        torch.cuda.synchronize()
        step_bytes = torch.cuda.max_memory_allocated() - before
        torch.cuda.empty_cache()
    used_bytes = total_bytes - free_bytes
    return MeasuredMemory(total_bytes=total_bytes, used_bytes=used_bytes, step_bytes=step_bytes + GRAPHS_BYTES)
