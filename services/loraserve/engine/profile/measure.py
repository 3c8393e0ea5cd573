"""Times random batches and adapter loads on a runner, without a scheduler or bus.

The batches are of every kind and size that occurs in serving. An engine with one CPU thread is timed in CPU seconds,
which other processes on the machine hardly change. Other engines are timed in elapsed seconds.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from random import Random

import msgspec
import numpy as np

from loraserve.adapter.dtypes import from_float32
from loraserve.adapter.format import ITEM_BYTES, Dtype, make_uniform_layout
from loraserve.adapter.pack import Slab, seal_slab
from loraserve.cost.fit import LoadSample
from loraserve.engine.adapters.pool import ExtentAllocator
from loraserve.engine.compute.protocol import Runner
from loraserve.engine.loading.memory import LayersToVerify, PoolMemory, find_damaged_layer, split_layers
from loraserve.engine.schedule.events import SchedulerLimits, SequenceStep, StepBatch
from loraserve.errors import ConfigError
from loraserve.messages import SamplingParams
from loraserve.model_shape import ModelShape

Progress = Callable[[str], None]
GREEDY = SamplingParams(max_tokens=1 << 20, temperature=0.0)
PROGRESS_INTERVAL_S = 5.0
KINDS = (
    "decode",
    "decode, adapters",
    "prefill",
    "prefill, adapters",
    "both",
    "both, adapters",
)
MIN_CONTEXT = 16
MIN_PREFILL = 4
MAX_PREFILLS = 3


class BatchPart(msgspec.Struct, frozen=True):
    """A sequence of a batch: ``tokens`` to compute after ``context`` tokens. ``adapter`` is a slot, -1 for none."""

    tokens: int
    context: int
    adapter: int = -1

    @property
    def is_decode(self) -> bool:
        return self.tokens == 1


class TimedBatch(msgspec.Struct, frozen=True):
    kind: str
    parts: tuple[BatchPart, ...]


def design_batches(limits: SchedulerLimits, adapters: int, count: int, seed: int = 0) -> list[TimedBatch]:
    """Return ``count`` random batches within the limits, of all KINDS in turn, for ``adapters`` loaded adapters."""
    rng = Random(seed)
    return [_draw_batch(KINDS[index % len(KINDS)], limits, adapters, rng) for index in range(count)]


def _draw_batch(kind: str, limits: SchedulerLimits, adapters: int, rng: Random) -> TimedBatch:
    adapters_used = [-1]
    if "adapters" in kind:
        adapters_used = rng.sample(range(adapters), _log_uniform(rng, 1, adapters))
    max_decodes = min(limits.max_running, max(1, limits.kv_blocks - MAX_PREFILLS))
    decodes = _log_uniform(rng, 1, max_decodes) if "prefill" not in kind else 0
    budget = limits.max_step_tokens - decodes
    prefills = _split_prefill(_log_uniform(rng, MIN_PREFILL, budget), rng) if "decode" not in kind else []
    if not prefills:
        decodes = max(decodes, 1)
    room = limits.kv_blocks // (decodes + len(prefills)) * limits.block_tokens
    longest = min(limits.max_model_tokens, room)
    lengths = [1] * decodes + [min(tokens, longest) for tokens in prefills]
    return TimedBatch(kind, tuple(_draw_part(tokens, longest, rng.choice(adapters_used), rng) for tokens in lengths))


def _draw_part(tokens: int, longest: int, adapter: int, rng: Random) -> BatchPart:
    """Return a sequence with a random context length. Half of the prefills have no context, like a new prompt."""
    context = _log_uniform(rng, MIN_CONTEXT, longest - tokens)
    return BatchPart(tokens, context if tokens == 1 else rng.choice((0, context)), adapter)


def _split_prefill(tokens: int, rng: Random) -> list[int]:
    """Return the token counts of one to MAX_PREFILLS prefills, or [] if ``tokens`` is below MIN_PREFILL."""
    count = min(rng.randint(1, MAX_PREFILLS), tokens // MIN_PREFILL)
    return [tokens // count + (index < tokens % count) for index in range(count)]


def _log_uniform(rng: Random, least: int, most: int) -> int:
    """Draw a log-uniform integer from ``least`` to ``most``. Returns ``max(most, 0)`` if ``most <= least``."""
    if most <= least:
        return max(most, 0)
    return min(int(least * ((most + 1) / least) ** rng.random()), most)


def make_random_slab(shape: ModelShape, dtype: Dtype, rank: int, seed: int) -> Slab:
    """Return a slab of random values with the magnitude of trained weights. The values do not affect the timing."""
    layout = make_uniform_layout(shape, dtype, rank, scale=1.0 / rank)
    values = np.random.default_rng(seed).standard_normal(layout.elements, dtype=np.float32) * np.float32(0.01)
    return seal_slab(layout, from_float32(values, dtype))


def place_slabs(slabs: Sequence[Slab], pool_bytes: int, slots: int) -> list[tuple[int, Slab]]:
    """Return (offset in bytes, slab) for the slabs that fit the pool and ``slots``. Raises ConfigError if none fits."""
    extents = ExtentAllocator(pool_bytes)
    placed: list[tuple[int, Slab]] = []
    for slab in slabs:
        offset_bytes = extents.allocate(slab.header.slab_bytes) if len(placed) < slots else None
        if offset_bytes is not None:
            placed.append((offset_bytes, slab))
    if not placed:
        raise ConfigError(f"the adapter pool of {pool_bytes} bytes holds none of the adapters; raise engine.pool_bytes")
    return placed


def measure_loads(
    runner: Runner,
    placed: Sequence[tuple[int, Slab]],
    chunk_bytes: int,
    digest_threads: int,
    rounds: int,
    cpu_seconds: bool,
) -> list[LoadSample]:
    """Copy, verify and install each slab ``rounds`` times. Returns (slab bytes, median seconds) of each slab."""
    seconds: list[list[float]] = [[] for _ in placed]
    clock = time.process_time if cpu_seconds else time.monotonic
    with ThreadPoolExecutor(digest_threads) as threads:
        for _ in range(rounds):
            for slot, (offset_bytes, slab) in enumerate(placed):
                runner.remove(slot)
                started_s = clock()
                _load(runner.pool, offset_bytes, slab, chunk_bytes, threads, digest_threads)
                runner.install(slot, slab.header, offset_bytes // ITEM_BYTES[slab.header.dtype])
                seconds[slot].append(clock() - started_s)
    return [(slab.header.slab_bytes, statistics.median(s)) for (_, slab), s in zip(placed, seconds, strict=True)]


def measure_steps(
    runner: Runner, steps: Sequence[StepBatch], rounds: int, cpu_seconds: bool, progress: Progress
) -> list[float]:
    """Return the median seconds of each step. Each round runs all steps, so a slow period affects many of them."""
    seconds: list[list[float]] = [[] for _ in steps]
    reported_s = time.monotonic()
    for round_index in range(rounds):
        for index, step in enumerate(steps):
            seconds[index].append(_step_s(runner, step, cpu_seconds))
            if time.monotonic() - reported_s > PROGRESS_INTERVAL_S:
                reported_s = time.monotonic()
                progress(f"steps: round {round_index + 1} of {rounds}, {index + 1} of {len(steps)}")
    return [statistics.median(of_step) for of_step in seconds]


def make_step(step_id: int, batch: TimedBatch, block_tokens: int, vocab: int) -> StepBatch:
    """Convert a batch to a runner's step, with random tokens and separate KV blocks for each sequence."""
    rng = Random(step_id)
    sequences = []
    next_block = 0
    for index, part in enumerate(batch.parts):
        blocks = -(-(part.context + part.tokens) // block_tokens)
        sequences.append(_make_part(index, part, range(next_block, next_block + blocks), rng, vocab))
        next_block += blocks
    return StepBatch(step_id=step_id, sequences=tuple(sequences))


def _make_part(index: int, part: BatchPart, blocks: range, rng: Random, vocab: int) -> SequenceStep:
    return SequenceStep(
        request_id=f"profile-{index}",
        tokens=tuple(rng.randrange(vocab) for _ in range(part.tokens)),
        start=part.context,
        blocks=tuple(blocks),
        sampling=GREEDY,
        prompt_length=part.context if part.is_decode else part.context + part.tokens,
        slot=part.adapter,
        output_index=1 if part.is_decode else 0,
    )


def _step_s(runner: Runner, step: StepBatch, cpu_seconds: bool) -> float:
    started_s = time.process_time()
    result = runner.submit(step).result()
    return time.process_time() - started_s if cpu_seconds else result.duration_s


def _load(
    pool: PoolMemory,
    offset_bytes: int,
    slab: Slab,
    chunk_bytes: int,
    threads: ThreadPoolExecutor,
    digest_threads: int,
) -> None:
    """Copy a slab from memory to the pool in chunks and verify it, like AdapterLoader."""
    layers = LayersToVerify(slab.header, on_device=pool.on_device)
    checks: list[Future[int | None]] = []
    for start in range(0, slab.header.slab_bytes, chunk_bytes):
        chunk = slab.data[start : start + chunk_bytes]
        pool.write(offset_bytes + start, chunk)
        due = split_layers(layers.take(start + len(chunk)), digest_threads)
        checks += [threads.submit(find_damaged_layer, pool, slab.header, offset_bytes, piece) for piece in due]
    if any(check.result() is not None for check in checks):
        raise ConfigError("a slab was written into the adapter pool and reads back differently; check the memory")
