"""Model runner for one CUDA GPU. Decode steps replay captured CUDA graphs. Tokens are sampled on the GPU."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from loraserve.adapter.format import SlabHeader
from loraserve.config import EngineConfig
from loraserve.engine.compute.protocol import ComputedStep, PackedStep, PendingStep, pack_step
from loraserve.engine.cuda.decoder import NONE, GpuStepInputs
from loraserve.engine.cuda.graphs import DecodeGraphs, batch_sizes, table_widths
from loraserve.engine.cuda.memory import device_errors
from loraserve.engine.cuda.sampling import Drawn, draw, prepare, sampled
from loraserve.engine.cuda.state import DTYPES, DeviceState, GpuWeightForm, allocate_state, compute_dtype
from loraserve.engine.loading.memory import PoolMemory, check_slab
from loraserve.engine.model.config import context_limit, read_decoder_config
from loraserve.engine.model.weights import load_weights
from loraserve.engine.schedule.events import PENDING_TOKEN, Sampled, SequenceStep, StepBatch, StepResult
from loraserve.errors import ConfigError
from loraserve.kernels.lora.work import LoraWork
from loraserve.messages.sampling import SamplingParams


def start_cuda_runner(
    model_dir: Path, engine: EngineConfig, device: torch.device, progress: Callable[[str], None]
) -> "CudaRunner":
    """Load the model and warm it up. Raises ConfigError, which names the invalid setting, field or tensor."""
    runner = load_cuda_runner(model_dir, engine, device, progress)
    try:
        runner.warm_up(progress)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"GPU memory: KV cache and adapter pool leave too little for steps ({str(error).splitlines()[0]}); lower "
            f"engine.memory_fraction (it is {engine.memory_fraction:g}) or engine.max_running"
        ) from error
    return runner


def load_cuda_runner(
    model_dir: Path, engine: EngineConfig, device: torch.device, progress: Callable[[str], None]
) -> "CudaRunner":
    """Load the model onto ``device``. Raises ConfigError if a setting, field or tensor is invalid."""
    config = read_decoder_config(model_dir)
    form = GpuWeightForm(DTYPES[compute_dtype(engine)], device)
    try:
        weights = load_weights(model_dir, config, form, progress)
        state = allocate_state(config, weights, engine, context_limit(config, progress), progress)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"GPU memory: the model does not fit ({str(error).splitlines()[0]}); give each engine a GPU of its own "
            "(cluster.engines), stop other processes there, or use a smaller model"
        ) from error
    return CudaRunner(state, engine)


class CudaRunner:
    """A Runner that prepares the next step on the host while the GPU computes.

    All launches and all changes of the adapter tables go to one stream, so a table never changes while a step reads it.
    Tests run the same code on the CPU, without streams and graphs.
    """

    def __init__(self, state: DeviceState, engine: EngineConfig) -> None:
        self.steps_ahead = 1
        self.shape = state.config.shape
        self.eos_token_ids = state.config.eos_token_ids
        self.block_tokens = engine.block_tokens
        self.kv_blocks = state.shares.kv_blocks
        self.max_positions = state.positions
        self.slab_dtype = engine.slab_dtype
        self.pool_elements = state.pool.tensor.numel()
        self.weights_backend = f"{str(state.dtype).removeprefix('torch.')} on {state.device}"
        self.pool: PoolMemory = state.pool
        self._engine = engine
        self._state = state
        self._device = state.device
        self._stream = torch.cuda.Stream(state.device) if state.device.type == "cuda" else None
        if self._stream is not None:
            # Wait for the allocation and initialisation, which ran on another stream.
            torch.cuda.synchronize(state.device)
        # The thread that loads adapters appends changes. The compute thread applies them before the next step.
        self._table_changes: deque[Callable[[], None]] = deque()
        self._previous_tokens = torch.zeros(engine.max_running, dtype=torch.int64, device=state.device)
        self._previous_rows: dict[str, int] = {}
        self._works: dict[int, LoraWork] = {}
        self._max_tokens = engine.max_step_tokens
        self._max_rank = engine.max_rank
        max_blocks = -(-self.max_positions // engine.block_tokens)
        self._graphs = DecodeGraphs(
            state.decoder,
            self._previous_tokens,
            batch_sizes(engine.max_running),
            table_widths(max_blocks, state.attention),
            self._work_for,
        )
        if self._stream is not None:
            # The current stream filled the weights, cache and tables.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def warm_up(self, progress: Callable[[str], None]) -> None:
        """Compile the kernels for all sizes, capture the graphs and allocate buffers before the first request."""
        with self._computing():
            size = 1
            while True:
                progress(f"compiling kernels for steps of {size} tokens")
                self._state.run_trial_step(min(size, self._max_tokens), self._work_for(size))
                if size >= self._max_tokens:
                    break
                size *= 2
            if self._stream is not None:
                self._graphs.capture(progress)
        # Allocate the remaining buffers, mainly page-locked memory.
        self._state.pool.warm_up(self._engine.load_chunk_bytes, self._engine.digest_threads)
        sampling = SamplingParams(max_tokens=1, temperature=0.0)
        first = SequenceStep(request_id="", tokens=(0,), start=0, blocks=(0,), sampling=sampling, prompt_length=1)
        self.step(StepBatch(step_id=0, sequences=(first,)))

    def install(self, slot: int, header: SlabHeader, base_elements: int) -> None:
        check_slab(header, self.slab_dtype, base_elements, self.pool_elements)
        if header.shape != self.shape:
            raise ValueError(f"slab is for {header.shape}, this model is {self.shape}; register the adapter again")
        if header.rank > self._max_rank:
            raise ValueError(f"slab has rank {header.rank}, engine.max_rank is {self._max_rank}; raise it")
        self._table_changes.append(partial(self._state.tables.install, slot, header, base_elements))

    def remove(self, slot: int) -> None:
        self._table_changes.append(partial(self._state.tables.remove, slot))

    def submit(self, batch: StepBatch) -> PendingStep:
        """Launch a step after the earlier steps and return without waiting for the GPU."""
        rows = [sequence for sequence in batch.sequences if sequence.sample]
        with self._computing():
            started = self._start_mark()
            logits = self._forward(batch.sequences)
            drawn = self._draw(logits, rows) if rows else None
            if isinstance(started, float):
                tokens = _collect_tokens(rows, drawn or ())
                return ComputedStep(
                    StepResult(step_id=batch.step_id, sampled=tokens, duration_s=time.monotonic() - started)
                )
            return PendingGpuStep(batch.step_id, rows, drawn, started)

    def step(self, batch: StepBatch) -> StepResult:
        return self.submit(batch).result()

    def logits(self, batch: StepBatch) -> torch.Tensor:
        """Write the KV of all tokens and return float32 logits [sequences with ``sample``, vocab] on the host."""
        with self._computing():
            return self._forward(batch.sequences).float().cpu()

    def _forward(self, sequences: Sequence[SequenceStep]) -> torch.Tensor:
        while self._table_changes:
            # Remove a change only after it succeeded. If it runs out of memory, the next step tries it again.
            self._table_changes[0]()
            self._table_changes.popleft()
        packed = pack_step(sequences, self.block_tokens)
        if packed.tokens.max() >= self.shape.vocab:
            # The lookup would be an illegal memory access, which makes the GPU unusable for this process.
            raise ValueError(f"token id {packed.tokens.max()} is outside the vocabulary of {self.shape.vocab}")
        source = _pending_token_rows(sequences, packed, self._previous_rows)
        adapted = bool((packed.slots >= 0).any())
        if len(packed.sampled) == len(sequences) == len(packed.tokens):
            graph = self._graphs.find(len(sequences), packed.table.shape[1], adapted)
            if graph is not None:
                graph.buffer.send(packed, source)
                graph.graph.replay()
                return graph.logits[: len(sequences)]
        work = self._work_for(len(packed.tokens)) if adapted else None
        inputs = GpuStepInputs.of_exact_size(packed, source, work, self._device)
        return self._state.decoder.forward(inputs, self._previous_tokens)

    def _draw(self, logits: torch.Tensor, rows: Sequence[SequenceStep]) -> Drawn:
        inputs = prepare(rows, self.shape.vocab, self.eos_token_ids, self._device)
        drawn = draw(logits, inputs)
        self._previous_tokens[: len(rows)].copy_(drawn.tokens)
        self._previous_rows = {sequence.request_id: row for row, sequence in enumerate(rows)}
        return drawn

    def _work_for(self, tokens: int) -> LoraWork:
        """Return a LoraWork for at least ``tokens`` tokens. The sizes are powers of two and ``max_step_tokens``."""
        size = min(1 << (tokens - 1).bit_length(), self._max_tokens)
        if size not in self._works:
            self._works[size] = LoraWork(self._state.tables, self._state.space, size)
        return self._works[size]

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with torch.inference_mode(), device_errors():
            if self._stream is None:
                yield
                return
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                yield

    def _start_mark(self) -> "torch.cuda.Event | float":
        if self._stream is None:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class PendingGpuStep:
    """A launched step whose results are being copied to the host. Any thread may call ``result``.

    Create it after launching the step, while the compute stream is torch's current stream.
    """

    def __init__(
        self, step_id: int, rows: Sequence[SequenceStep], drawn: Drawn | None, started: torch.cuda.Event
    ) -> None:
        self._step_id = step_id
        self._rows = rows
        self._results = [None if tensor is None else _copy_to_host(tensor) for tensor in drawn or ()]
        self._started = started
        self._device = torch.cuda.current_device()
        self._ended = torch.cuda.Event(enable_timing=True)
        self._ended.record()

    def result(self) -> StepResult:
        """Wait for the step and return its tokens and GPU time. Raises DeviceLostError if the GPU is unusable."""
        with device_errors(), torch.cuda.device(self._device):
            self._ended.synchronize()
        tokens = _collect_tokens(self._rows, self._results)
        return StepResult(
            step_id=self._step_id, sampled=tokens, duration_s=self._started.elapsed_time(self._ended) / 1e3
        )


def _collect_tokens(rows: Sequence[SequenceStep], results: Sequence[torch.Tensor | None]) -> tuple[Sampled, ...]:
    arrays = [None if tensor is None else tensor.numpy() for tensor in results]
    return tuple(sampled(rows, *arrays)) if arrays else ()  # type: ignore[arg-type]


def _copy_to_host(tensor: torch.Tensor) -> torch.Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _pending_token_rows(
    sequences: Sequence[SequenceStep], packed: PackedStep, previous_rows: dict[str, int]
) -> NDArray[np.int32]:
    """Return for each token its row among the preceding step's sampled tokens. It is NONE for a known token."""
    source = np.full(len(packed.tokens), NONE, dtype=np.int32)
    for index, sequence in enumerate(sequences):
        if sequence.tokens[0] == PENDING_TOKEN:
            # The row is missing if that step failed. The result is then discarded, so any token will do.
            source[packed.query_start[index]] = previous_rows.get(sequence.request_id, 0)
    return source
