"""The form in which weights compute on the GPU: one dtype for all products, norms in float32."""

import gc
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from loraserve.config import EngineConfig
from loraserve.engine.compute.runner import pack
from loraserve.engine.cuda.decoder import GpuDecoder
from loraserve.engine.cuda.memory import SHOWN_RANKS, Measured, Shares, divide, room
from loraserve.engine.cuda.pool import DevicePool
from loraserve.engine.cuda.sampling import draw, prepare
from loraserve.engine.cuda.step_buffer import UNKNOWN, eager_step
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


class DeviceForm:
    """A WeightForm: each tensor is rounded to ``dtype`` and moved as it is read, so that the host never holds all."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device

    def embedding(self, weight: torch.Tensor) -> torch.Tensor:
        return self._moved(weight)

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        return Linear(self._moved(weight), None if bias is None else self._moved(bias))

    def tied_head(self, embedding: torch.Tensor) -> Linear:
        return Linear(embedding, None)

    def vector(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.to(self._device)

    def _moved(self, weight: torch.Tensor) -> torch.Tensor:
        moved = weight.to(self._device, self._dtype, copy=True)
        if self._dtype == torch.float16 and not bool(moved.isfinite().all()):
            raise ConfigError("engine.weights=fp16: the model has weights beyond 65504; use bf16 weights and slabs")
        return moved


def compute_dtype(engine: EngineConfig) -> str:
    """The key of DTYPES that ``engine.weights`` asks for; auto is the adapters' own.

    Raises ConfigError where weights and adapters would be of different dtypes: kernels multiply like with like.
    """
    if engine.weights == "auto":
        return next(name for name, slab in SLAB_DTYPES.items() if slab == engine.slab_dtype)
    if SLAB_DTYPES[engine.weights] != engine.slab_dtype:
        raise ConfigError(
            f"engine.weights={engine.weights} needs engine.slab_dtype={SLAB_DTYPES[engine.weights]} on a GPU, it is "
            f"{engine.slab_dtype}; set both alike, or engine.weights=auto"
        )
    return engine.weights


# MERGED: loraserve.engine.cuda.state
# """What a GPU holds for an engine: weights, adapter tables, KV cache and pool, sized to what is free."""


GRAPHS_BYTES = 512 << 20
"""Left for what captured graphs and the libraries take, which shows only when it is too late to divide anew."""


@dataclass(frozen=True)
class DeviceState:
    """Allocated once. ``positions`` is the longest context; ``attention`` how the cache is read."""

    config: DecoderConfig
    device: torch.device
    dtype: torch.dtype
    tables: AdapterTables
    space: Workspace
    pool: DevicePool
    decoder: GpuDecoder
    shares: Shares
    positions: int
    attention: Backend
    block_tokens: int
    max_running: int

    def describe(self) -> str:
        """Name of the form in which weights compute."""
        return f"{str(self.dtype).removeprefix('torch.')} on {self.device}"

    def try_step(self, tokens: int, work: LoraWork | None, context: int = 0) -> None:
        """Compute a step of that many tokens which touches no KV block but the first, and draw from all its rows.

        With a ``context`` they are the end of one sequence of that length, else as many sequences as may run.
        """
        rows = [_trial(self, 0, tokens, context - tokens)] if context > tokens else _trial_rows(self, tokens)
        packed = pack(rows, self.block_tokens)
        step, batch = eager_step(packed, np.full(tokens, UNKNOWN, np.int32), self.device)
        drawn = torch.zeros(1, dtype=torch.int64, device=self.device)
        logits = self.decoder.forward(step, drawn, batch, work)
        draw(logits, prepare(rows, self.config.shape.vocab, self.config.eos_token_ids, self.device))


def allocate(
    config: DecoderConfig,
    weights: DecoderWeights,
    engine: EngineConfig,
    positions: int,
    progress: Callable[[str], None],
) -> DeviceState:
    """Everything beside the weights. Raises ConfigError where the GPU's memory or a setting does not allow it."""
    device, dtype = weights.embedding.device, weights.embedding.dtype
    attention, why = pick_backend(config.shape, engine.block_tokens, dtype, device)
    progress(f"attention: {attention} ({why})")
    tables = AdapterTables(config.shape, engine.max_adapters, str(device))
    space = Workspace(tables, engine.max_step_tokens, engine.max_rank, dtype)

    def state(shares: Shares, longest: int) -> DeviceState:
        cache = GpuKvCache(config.shape, shares.kv_blocks, engine.block_tokens, dtype, device)
        pool = DevicePool(shares.pool_bytes // dtype.itemsize, dtype, device)
        decoder = GpuDecoder(config, weights, cache, pool.tensor, tables, longest, attention)
        return DeviceState(
            config, device, dtype, tables, space, pool, decoder, shares, longest, attention, engine.block_tokens,
            engine.max_running,
        )  # fmt: skip

    block_bytes = gpu_block_bytes(config.shape, engine.block_tokens, dtype)
    if device.type == "cuda":
        trial = Shares(kv_blocks=-(-engine.max_step_tokens // engine.block_tokens), pool_bytes=1 << 20)
        measured = _measure(state(trial, positions), engine.max_step_tokens)
        shares = divide(measured, engine.memory_fraction, engine.pool_fraction, block_bytes)
    else:
        shares = Shares(kv_blocks=engine.kv_bytes // block_bytes, pool_bytes=engine.pool_bytes)
    if shares.kv_blocks < 1:
        raise ConfigError(f"engine.kv_bytes={engine.kv_bytes} holds not one block; give at least {block_bytes}")
    ranks = [rank for rank in SHOWN_RANKS if rank <= engine.max_rank]
    progress(room(config.shape, engine.slab_dtype, shares, engine.block_tokens, engine.max_adapters, ranks))
    return state(shares, min(positions, shares.kv_blocks * engine.block_tokens))


def _measure(state: DeviceState, tokens: int) -> Measured:
    """What the largest steps take beside what stays, by computing them: many sequences, and one long context."""
    gc.collect()  # what another runner of this process left behind is not in use
    with torch.inference_mode(), torch.cuda.device(state.device):
        work = LoraWork(state.tables, state.space, tokens)
        state.try_step(tokens, work)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        free_bytes, total_bytes = torch.cuda.mem_get_info()
        state.try_step(tokens, work)
        state.try_step(tokens, work, context=state.positions)
        torch.cuda.synchronize()
        step_bytes = torch.cuda.max_memory_allocated() - before
        torch.cuda.empty_cache()
    used_bytes = total_bytes - free_bytes
    return Measured(total_bytes=total_bytes, used_bytes=used_bytes, step_bytes=step_bytes + GRAPHS_BYTES)


def _trial_rows(state: DeviceState, tokens: int) -> list[SequenceStep]:
    """Sequences as equal as can be, none longer than the context."""
    count = max(min(state.max_running, tokens), -(-tokens // state.positions))
    return [_trial(state, i, len(part)) for i, part in enumerate(np.array_split(np.arange(tokens), count))]


def _trial(state: DeviceState, index: int, tokens: int, start: int = 0) -> SequenceStep:
    """All in the first block, and drawn with what takes the most memory."""
    return SequenceStep(
        request_id=str(index),
        tokens=(0,) * tokens,
        start=start,
        blocks=(0,) * -(-(start + tokens) // state.block_tokens),
        sampling=SamplingParams(max_tokens=1, temperature=1.0, top_p=0.9),
        prompt_length=tokens,
    )
