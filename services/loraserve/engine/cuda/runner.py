"""A step on its way through the GPU: its results are copied back behind it, and waited for once."""

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
from loraserve.engine.compute.protocol import ComputedStep, PendingStep
from loraserve.engine.compute.runner import PackedStep, pack
from loraserve.engine.cuda.graphs import DecodeGraphs, batch_sizes, table_widths
from loraserve.engine.cuda.memory import device_errors
from loraserve.engine.cuda.sampling import Drawn, draw, prepare, sampled
from loraserve.engine.cuda.state import DTYPES, DeviceForm, DeviceState, allocate, compute_dtype
from loraserve.engine.cuda.step_buffer import UNKNOWN, eager_step
from loraserve.engine.loading.memory import PoolMemory, check_slab
from loraserve.engine.model.config import context_limit, read_decoder_config
from loraserve.engine.model.weights import load_weights
from loraserve.engine.schedule.events import PENDING_TOKEN, Sampled, SequenceStep, StepBatch, StepResult
from loraserve.errors import ConfigError
from loraserve.kernels.lora.work import LoraWork
from loraserve.messages.sampling import SamplingParams


class PendingGpuStep:
    """Made on the stream that computes, right after everything was launched. ``result`` may be called elsewhere."""

    def __init__(
        self, step_id: int, rows: Sequence[SequenceStep], drawn: Drawn | None, started: torch.cuda.Event
    ) -> None:
        self._step_id = step_id
        self._rows = rows
        self._results = [None if part is None else _sent_back(part) for part in results(drawn)]
        self._started = started
        self._device = torch.cuda.current_device()
        self._ended = torch.cuda.Event(enable_timing=True)
        self._ended.record()

    def result(self) -> StepResult:
        """Waits for the step; raises what the GPU reports. ``duration_s`` is the time on the GPU alone."""
        with device_errors(), torch.cuda.device(self._device):
            self._ended.synchronize()
        tokens = collect(self._rows, self._results)
        return StepResult(
            step_id=self._step_id, sampled=tokens, duration_s=self._started.elapsed_time(self._ended) / 1e3
        )


def results(drawn: Drawn | None) -> tuple[torch.Tensor | None, ...]:
    """What is to be read back; nothing where nobody drew."""
    return (drawn.tokens, drawn.logprobs, drawn.top_tokens, drawn.top_logprobs) if drawn else ()


def collect(rows: Sequence[SequenceStep], parts: Sequence[torch.Tensor | None]) -> tuple[Sampled, ...]:
    """From what ``results`` gave, on the host by now, to tokens."""
    arrays = [None if part is None else part.numpy() for part in parts]
    return tuple(sampled(rows, *arrays)) if arrays else ()  # type: ignore[arg-type]


def _sent_back(tensor: torch.Tensor) -> torch.Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


# MERGED: loraserve.engine.cuda.runner
# """The model on one CUDA GPU: turns a StepBatch into one upload, one replayed graph and one download."""


class CudaRunner:
    """A Runner whose steps overlap: the host prepares the next one while the GPU computes.

    Everything is launched on one stream, in order, changes of the adapter tables included: what a step in flight reads
    never changes under it. On a device that is no GPU (tests) the same code computes without streams and graphs.
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
        self.weights_backend = state.describe()
        self.pool: PoolMemory = state.pool
        self._engine = engine
        self._state = state
        self._device = state.device
        self._stream = torch.cuda.Stream(state.device) if state.device.type == "cuda" else None
        if self._stream is not None:
            # What was allocated and filled so far was so on another stream.
            torch.cuda.synchronize(state.device)
        # Written by who loads, carried out before the next step by who computes.
        self._changes: deque[Callable[[], None]] = deque()
        self._drawn = torch.zeros(engine.max_running, dtype=torch.int64, device=state.device)
        self._row_of: dict[str, int] = {}
        self._works: dict[int, LoraWork] = {}
        self._most_tokens = engine.max_step_tokens
        self._max_rank = engine.max_rank
        most_blocks = -(-self.max_positions // engine.block_tokens)
        self._graphs = DecodeGraphs(
            state.decoder,
            self._drawn,
            batch_sizes(engine.max_running),
            table_widths(most_blocks, state.attention),
            self._work,
        )
        if self._stream is not None:
            # Weights, cache and tables were filled on the stream that is current now.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def warm_up(self, progress: Callable[[str], None]) -> None:
        """Compiles the kernels of every size, and captures the graphs, so that no request waits for either."""
        with self._computing():
            size = 1
            while True:
                progress(f"compiling kernels for steps of {size} tokens")
                self._state.try_step(min(size, self._most_tokens), self._work(size))
                if size >= self._most_tokens:
                    break
                size *= 2
            if self._stream is not None:
                self._graphs.capture(progress)
        # What is left to be allocated once, page-locked memory above all, is so before the first request.
        self._state.pool.warm_up(self._engine.load_chunk_bytes, self._engine.digest_threads)
        sampling = SamplingParams(max_tokens=1, temperature=0.0)
        first = SequenceStep(request_id="", tokens=(0,), start=0, blocks=(0,), sampling=sampling, prompt_length=1)
        self.step(StepBatch(step_id=0, sequences=(first,)))

    def install(self, slot: int, header: SlabHeader, base_elements: int) -> None:
        """Steps submitted from now on use the slab at ``base_elements`` of the pool for tokens of ``slot``.

        Raises ValueError where the slab is of another dtype or model, of too large a rank, or not within the pool.
        """
        check_slab(header, self.slab_dtype, base_elements, self.pool_elements)
        if header.shape != self.shape:
            raise ValueError(f"slab is for {header.shape}, this model is {self.shape}; register the adapter again")
        if header.rank > self._max_rank:
            raise ValueError(f"slab has rank {header.rank}, engine.max_rank is {self._max_rank}; raise it")
        self._changes.append(partial(self._state.tables.install, slot, header, base_elements))

    def remove(self, slot: int) -> None:
        """Tokens of ``slot`` compute as the base model from the next step on."""
        self._changes.append(partial(self._state.tables.remove, slot))

    def submit(self, batch: StepBatch) -> PendingStep:
        """Launch the step behind those before it. Returns as soon as everything is on its way."""
        rows = [sequence for sequence in batch.sequences if sequence.sample]
        with self._computing():
            started = self._event()
            logits = self._forward(batch.sequences)
            drawn = self._draw(logits, rows) if rows else None
            if isinstance(started, float):
                tokens = collect(rows, results(drawn))
                return ComputedStep(
                    StepResult(step_id=batch.step_id, sampled=tokens, duration_s=time.monotonic() - started)
                )
            return PendingGpuStep(batch.step_id, rows, drawn, started)

    def step(self, batch: StepBatch) -> StepResult:
        """Compute one step and wait for it."""
        return self.submit(batch).result()

    def logits(self, batch: StepBatch) -> torch.Tensor:
        """Writes the KV of all tokens; float32 logits [sequences with ``sample``, vocab] on the host."""
        with self._computing():
            return self._forward(batch.sequences).float().cpu()

    def _forward(self, sequences: Sequence[SequenceStep]) -> torch.Tensor:
        while self._changes:
            # Gone once it is carried out: what failed for want of memory must not leave its slot the base model's.
            self._changes[0]()
            self._changes.popleft()
        packed = pack(sequences, self.block_tokens)
        if packed.tokens.max() >= self.shape.vocab:
            # On the device it would be the end of more than this step.
            raise ValueError(f"token id {packed.tokens.max()} is outside the vocabulary of {self.shape.vocab}")
        source = _sources(sequences, packed, self._row_of)
        adapted = bool((packed.slots >= 0).any())
        if len(packed.sampled) == len(sequences) == len(packed.tokens):
            graph = self._graphs.find(len(sequences), packed.table.shape[1], adapted)
            if graph is not None:
                graph.step.send(packed, source)
                graph.graph.replay()
                return graph.logits[: len(sequences)]
        return self._eager(packed, source, adapted)

    def _eager(self, packed: PackedStep, source: NDArray[np.int32], adapted: bool) -> torch.Tensor:
        step, batch = eager_step(packed, source, self._device)
        work = self._work(len(packed.tokens)) if adapted else None
        return self._state.decoder.forward(step, self._drawn, batch, work)

    def _draw(self, logits: torch.Tensor, rows: Sequence[SequenceStep]) -> Drawn:
        inputs = prepare(rows, self.shape.vocab, self.eos_token_ids, self._device)
        drawn = draw(logits, inputs)
        self._drawn[: len(rows)].copy_(drawn.tokens)
        self._row_of = {sequence.request_id: row for row, sequence in enumerate(rows)}
        return drawn

    def _work(self, tokens: int) -> LoraWork:
        """One for each size up to which steps are rounded."""
        size = min(1 << (tokens - 1).bit_length(), self._most_tokens)
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

    def _event(self) -> "torch.cuda.Event | float":
        """When a step began: on the GPU, or by the clock where there is none."""
        if self._stream is None:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _sources(sequences: Sequence[SequenceStep], packed: PackedStep, row_of: dict[str, int]) -> NDArray[np.int32]:
    """For each token its row among the last step's drawn ones, UNKNOWN where the token is known."""
    source = np.full(len(packed.tokens), UNKNOWN, dtype=np.int32)
    for index, sequence in enumerate(sequences):
        if sequence.tokens[0] == PENDING_TOKEN:
            # Where that step failed, any token will do: nobody uses what comes of it.
            source[packed.query_start[index]] = row_of.get(sequence.request_id, 0)
    return source


# MERGED: loraserve.engine.cuda.runner
# """From a model directory to a CUDA runner; what this machine lacks is said with what to do about it."""


def start_cuda_runner(
    model_dir: Path, engine: EngineConfig, device: torch.device, progress: Callable[[str], None]
) -> CudaRunner:
    """The model on ``device``, warm. Raises ConfigError naming the setting, field or tensor at fault."""
    runner = load_cuda_runner(model_dir, engine, device, progress)
    try:
        runner.warm_up(progress)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"GPU memory: not enough is left to compute beside what is set aside ({str(error).splitlines()[0]}); lower "
            f"engine.memory_fraction (it is {engine.memory_fraction:g}) or engine.max_running"
        ) from error
    return runner


def load_cuda_runner(
    model_dir: Path, engine: EngineConfig, device: torch.device, progress: Callable[[str], None]
) -> CudaRunner:
    """The model on ``device``, not warm yet. Raises ConfigError naming the setting, field or tensor at fault."""
    config = read_decoder_config(model_dir)
    form = DeviceForm(DTYPES[compute_dtype(engine)], device)
    try:
        weights = load_weights(model_dir, config, form, progress)
        state = allocate(config, weights, engine, context_limit(config, progress), progress)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"GPU memory: the model does not fit ({str(error).splitlines()[0]}); give each engine a GPU of its own "
            "(cluster.engines), stop what else runs there, or use a smaller model"
        ) from error
    return CudaRunner(state, engine)
