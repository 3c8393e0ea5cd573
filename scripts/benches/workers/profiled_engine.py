"""One of several concurrently profiled engines: measures CPU seconds of steps, loads and a single prompt.

profiled_engine.py MODEL RANK,RANK,... SETTING...
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from harness.worker import serve

from loraserve.config import load_config
from loraserve.cost.fit import LoadSample
from loraserve.engine.profile.measure import (
    BatchPart,
    TimedBatch,
    design_batches,
    make_random_slab,
    make_step,
    measure_loads,
    measure_steps,
    place_slabs,
)
from loraserve.engine.schedule.events import StepBatch
from loraserve.engine.schedule.report import step_shape
from loraserve.engine.setup import build_runner, digest_threads_for, scheduler_limits

ALONE = 5


class Engine:
    """The engine. ``hello`` returns its limits; each answer has samples of batches chosen by the question's seed."""

    def __init__(self, model: Path, ranks: tuple[int, ...], settings: list[str]) -> None:
        self.config = load_config(overrides=[*settings, f"model.path={model}"])
        self.runner = build_runner(self.config, lambda text: None)
        self.limits = scheduler_limits(self.config, self.runner)
        dtype, shape = self.config.engine.slab_dtype, self.runner.shape
        slabs = [make_random_slab(shape, dtype, rank, seed) for seed, rank in enumerate(ranks)]
        self.placed = place_slabs(slabs, self.limits.pool_bytes, self.limits.max_adapters)
        self.adapters = {slot: slab.header for slot, (_, slab) in enumerate(self.placed)}
        self._loads(1)

    def hello(self) -> dict[str, Any]:
        limits = {name: value for name, value in msgspec.structs.asdict(self.limits).items() if name != "eos_token_ids"}
        return {"limits": limits, "weights": self.runner.weights_backend}

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        batches = design_batches(self.limits, len(self.adapters), question["batches"], question["seed"])
        shapes = [msgspec.structs.asdict(step_shape(step, self.adapters)[0]) for step in self._steps(batches)]
        alone = TimedBatch("prefill", (BatchPart(question["prompt_tokens"], 0),))
        return {
            "steps": list(zip(shapes, self._cpu_s(batches, question["rounds"]), strict=True)),
            "loads": self._loads(question["rounds"]),
            "alone_s": self._cpu_s([alone], ALONE)[0],
        }

    def _cpu_s(self, batches: Sequence[TimedBatch], rounds: int) -> list[float]:
        """Return the median CPU seconds of each batch."""
        return measure_steps(self.runner, self._steps(batches), rounds, True, lambda text: None)

    def _steps(self, batches: Sequence[TimedBatch]) -> list[StepBatch]:
        block_tokens, vocab = self.limits.block_tokens, self.runner.shape.vocab
        return [make_step(index, batch, block_tokens, vocab) for index, batch in enumerate(batches)]

    def _loads(self, rounds: int) -> list[LoadSample]:
        threads = digest_threads_for(self.config, on_device=self.runner.pool.on_device)
        return measure_loads(self.runner, self.placed, self.config.engine.load_chunk_bytes, threads, rounds, True)


if __name__ == "__main__":
    model, ranks, *settings = sys.argv[1:]
    engine = Engine(Path(model), tuple(map(int, ranks.split(","))), settings)
    serve(engine.hello(), engine.answer)
