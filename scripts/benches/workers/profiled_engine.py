"""One engine out of several that are timed at once: its steps, its loads, and a first token with nothing else there.

profiled_engine.py MODEL RANK,RANK,... SETTING...
"""

import os
import statistics
import sys
from pathlib import Path
from typing import Any

import msgspec
from harness.worker import serve

from loraserve.config import load_config
from loraserve.engine.profile.design import Batch, Part, SizedAdapter, design, shape_of_batch
from loraserve.engine.profile.measure import made_up_slab, measure_loads, measure_steps, place
from loraserve.engine.setup import build_runner, scheduler_limits

ALONE = 5


class Engine:
    """``hello`` has what the engine is; each answer has samples of batches that no other question has."""

    def __init__(self, model: Path, ranks: tuple[int, ...], settings: list[str]) -> None:
        self.config = load_config(overrides=[*settings, f"model.path={model}"])
        self.runner = build_runner(self.config, lambda text: None)
        self.limits = scheduler_limits(self.config, self.runner)
        dtype, shape = self.config.engine.slab_dtype, self.runner.shape
        slabs = [made_up_slab(shape, dtype, rank, seed) for seed, rank in enumerate(ranks)]
        self.placed = place(slabs, self.limits.pool_bytes, self.limits.max_adapters)
        self.adapters = [SizedAdapter(slab.header.rank, slab.header.slab_bytes) for _, slab in self.placed]
        measure_loads(self.runner, self.placed, self.config.engine.load_chunk_bytes, 1)

    def hello(self) -> dict[str, Any]:
        limits = {name: value for name, value in msgspec.structs.asdict(self.limits).items() if name != "eos_token_ids"}
        return {"pid": os.getpid(), "limits": limits, "weights": self.runner.weights_backend}

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        batches = design(self.limits, len(self.adapters), question["batches"], question["seed"])
        alone = Batch("prefill", (Part(question["prompt_tokens"], 0),))
        steps_s = [self._times(batches) for _ in range(question["rounds"])]
        loads = measure_loads(self.runner, self.placed, self.config.engine.load_chunk_bytes, question["rounds"])
        return {
            # Means: an engine that is held to a share of a core is stopped during some steps and not during others.
            "steps": [
                (msgspec.structs.asdict(shape_of_batch(batch, self.adapters)), statistics.fmean(seconds))
                for batch, *seconds in zip(batches, *steps_s, strict=True)
            ],
            "loads": loads,
            "alone_s": statistics.median(self._times([alone])[0] for _ in range(ALONE)),
        }

    def _times(self, batches: list[Batch]) -> list[float]:
        limits = self.limits
        return measure_steps(self.runner, batches, limits.block_tokens, self.runner.shape.vocab, 1, lambda text: None)


if __name__ == "__main__":
    model, ranks, *settings = sys.argv[1:]
    engine = Engine(Path(model), tuple(map(int, ranks.split(","))), settings)
    serve(engine.hello(), engine.answer)
