"""Times steps and loads on a runner, through what every runner has: no scheduler, no bus.

An engine that computes in one thread of a CPU is timed in CPU seconds: those are what the work takes on a core of its
own, whatever else the machine does meanwhile. Others are timed by the runner's own clock.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from random import Random

import numpy as np

from loraserve.adapter.dtypes import from_float32
from loraserve.adapter.format import ITEM_BYTES, Dtype, make_uniform_layout
from loraserve.adapter.pack import Slab, seal_slab
from loraserve.cost.fit import LoadSample
from loraserve.engine.adapters.extents import ExtentAllocator
from loraserve.engine.compute.protocol import Runner
from loraserve.engine.loading.memory import PoolMemory
from loraserve.engine.loading.slab_reader import Arrivals, damaged_layer, shares
from loraserve.engine.profile.design import Batch, Part
from loraserve.engine.schedule.events import SequenceStep, StepBatch
from loraserve.errors import ConfigError
from loraserve.messages import SamplingParams
from loraserve.model_shape import ModelShape

Progress = Callable[[str], None]
GREEDY = SamplingParams(max_tokens=1 << 20, temperature=0.0)
SAY_EVERY_S = 5.0


def made_up_slab(shape: ModelShape, dtype: Dtype, rank: int, seed: int) -> Slab:
    """Random values, of the size that trained adapters have: what they are does not change what they cost."""
    layout = make_uniform_layout(shape, dtype, rank, scale=1.0 / rank)
    values = np.random.default_rng(seed).standard_normal(layout.elements, dtype=np.float32) * np.float32(0.01)
    return seal_slab(layout, from_float32(values, dtype))


def place(slabs: Sequence[Slab], pool_bytes: int, most: int) -> list[tuple[int, Slab]]:
    """Offsets for as many as the pool and its slots hold. Raises ConfigError where there is room for none."""
    extents = ExtentAllocator(pool_bytes)
    placed: list[tuple[int, Slab]] = []
    for slab in slabs:
        offset_bytes = extents.allocate(slab.header.slab_bytes) if len(placed) < most else None
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
    """Copying, verifying and installing each: what the engine does with a slab once it has it. All stay installed."""
    taken: list[list[float]] = [[] for _ in placed]
    clock = time.process_time if cpu_seconds else time.monotonic
    with ThreadPoolExecutor(digest_threads) as threads:
        for _ in range(rounds):
            for slot, (offset_bytes, slab) in enumerate(placed):
                runner.remove(slot)
                started_s = clock()
                _load(runner.pool, offset_bytes, slab, chunk_bytes, threads, digest_threads)
                runner.install(slot, slab.header, offset_bytes // ITEM_BYTES[slab.header.dtype])
                taken[slot].append(clock() - started_s)
    return [(slab.header.slab_bytes, statistics.median(s)) for (_, slab), s in zip(placed, taken, strict=True)]


def measure_steps(
    runner: Runner, steps: Sequence[StepBatch], rounds: int, cpu_seconds: bool, progress: Progress
) -> list[float]:
    """Median seconds of each. All are run in turn and then again, so that a slow minute is not one batch's alone."""
    taken: list[list[float]] = [[] for _ in steps]
    said_s = time.monotonic()
    for turn in range(rounds):
        for index, step in enumerate(steps):
            taken[index].append(_step_s(runner, step, cpu_seconds))
            if time.monotonic() - said_s > SAY_EVERY_S:
                said_s = time.monotonic()
                progress(f"steps: round {turn + 1} of {rounds}, {index + 1} of {len(steps)}")
    return [statistics.median(seconds) for seconds in taken]


def to_step(step_id: int, batch: Batch, block_tokens: int, vocab: int) -> StepBatch:
    """A batch as a runner takes it: random tokens, blocks of its own for each sequence."""
    rng = Random(step_id)
    sequences = []
    next_block = 0
    for index, part in enumerate(batch.parts):
        blocks = -(-(part.context + part.tokens) // block_tokens)
        sequences.append(_sequence(index, part, range(next_block, next_block + blocks), rng, vocab))
        next_block += blocks
    return StepBatch(step_id=step_id, sequences=tuple(sequences))


def _sequence(index: int, part: Part, blocks: range, rng: Random, vocab: int) -> SequenceStep:
    return SequenceStep(
        request_id=f"profile-{index}",
        tokens=tuple(rng.randrange(vocab) for _ in range(part.tokens)),
        start=part.context,
        blocks=tuple(blocks),
        sampling=GREEDY,
        prompt_length=part.context if part.decodes else part.context + part.tokens,
        slot=part.adapter,
        output_index=1 if part.decodes else 0,
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
    """As loader.py does it, from memory."""
    arrivals = Arrivals(slab.header, on_device=pool.waits)
    checks: list[Future[int | None]] = []
    for start in range(0, slab.header.slab_bytes, chunk_bytes):
        chunk = slab.data[start : start + chunk_bytes]
        pool.write(offset_bytes + start, chunk)
        due = shares(arrivals.upto(start + len(chunk)), digest_threads)
        checks += [threads.submit(damaged_layer, pool, slab.header, offset_bytes, layers) for layers in due]
    if any(check.result() is not None for check in checks):
        raise ConfigError("what was written into the adapter pool is not what is read from it; check the memory")
