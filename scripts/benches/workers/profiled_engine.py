"""One engine out of several that are timed at once: CPU seconds of its steps and loads, and of a prompt by itself.

profiled_engine.py MODEL RANK,RANK,... SETTING...
"""

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from harness.worker import serve

from loraserve.config import load_config
from loraserve.engine.profile.design import Batch, Part, SizedAdapter, design, shape_of_batch
from loraserve.engine.profile.measure import made_up_slab, measure_loads, place, to_step
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
        return {"limits": limits, "weights": self.runner.weights_backend}

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        batches = design(self.limits, len(self.adapters), question["batches"], question["seed"])
        alone = Batch("prefill", (Part(question["prompt_tokens"], 0),))
        rounds = [self._cpu_s(batches) for _ in range(question["rounds"])]
        loads = measure_loads(self.runner, self.placed, self.config.engine.load_chunk_bytes, question["rounds"])
        return {
            "steps": [
                (msgspec.structs.asdict(shape_of_batch(batch, self.adapters)), statistics.median(seconds))
                for batch, *seconds in zip(batches, *rounds, strict=True)
            ],
            "loads": loads,
            "alone_s": statistics.median(self._cpu_s([alone] * ALONE)),
        }

    def _cpu_s(self, batches: Sequence[Batch]) -> list[float]:
        return [self._step_cpu_s(index, batch) for index, batch in enumerate(batches)]

    def _step_cpu_s(self, index: int, batch: Batch) -> float:
        step = to_step(index, batch, self.limits.block_tokens, self.runner.shape.vocab)
        began_s = time.process_time()
        self.runner.submit(step).result()
        return time.process_time() - began_s


if __name__ == "__main__":
    model, ranks, *settings = sys.argv[1:]
    engine = Engine(Path(model), tuple(map(int, ranks.split(","))), settings)
    serve(engine.hello(), engine.answer)
