"""Our side of the step comparison: the real scheduler and runner in one process.

Answers {"batch", "adapters", "tokens"} with step times.
"""

import sys
from pathlib import Path
from typing import Any

from harness.cases import PROMPT_TOKENS, Case, adapter_name, adapter_of, prompt
from harness.profile import Profile
from harness.worker import serve

from loraserve.adapter.pack import pack_peft
from loraserve.config import Config, EngineConfig, ModelConfig
from loraserve.engine.setup import build_runner
from loraserve.messages import SamplingParams
from loraserve.testing.engine.offline import OfflineEngine, OfflineRequest


class Side:
    """The engine. ``seed`` grows with each question, so that no prompt repeats."""

    def __init__(self, model: Path, adapters: Path, threads: int, steps: int, count: int) -> None:
        self.steps = steps
        # The pool holds all adapters, because the bench measures steps and not loads.
        engine = EngineConfig(threads=threads, pool_bytes=1 << 30, prefix_cache=False)
        config = Config(model=ModelConfig(path=str(model)), engine=engine)
        self.runner = build_runner(config, lambda text: None)
        folders = [adapters / adapter_name(index) for index in range(count)]
        shape = self.runner.shape
        slabs = {folder.name: pack_peft(folder, shape, engine.slab_dtype, engine.max_rank) for folder in folders}
        self.engine = OfflineEngine(config, slabs, self.runner)
        self.profile = Profile()
        self.seed = 0

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        case = Case(question["batch"], question["adapters"], question["tokens"])
        self.seed += 1
        if not question.get("profile"):
            return {"steps_s": self._steps(case)}
        with self.profile.watching():
            steps_s = self._steps(case, profiled=True)
        return {"steps_s": steps_s, "operations": self.profile.table()}

    def _steps(self, case: Case, profiled: bool = False) -> list[float]:
        decode = case.tokens == 1
        length = PROMPT_TOKENS if decode else case.tokens
        sampling = SamplingParams(max_tokens=self.steps if decode else 1, temperature=0.0, ignore_eos=True)
        requests = [
            OfflineRequest(
                prompt=prompt(index, length, self.runner.shape.vocab, self.seed),
                sampling=sampling,
                adapter=adapter_of(case, index),
            )
            for index in range(case.batch)
        ]
        due = case.batch * case.tokens
        watch = self.profile.begin_step if profiled else None
        self.engine.generate(requests, before_step=watch and (lambda batch: watch(_tokens(batch) == due)))
        return [step.duration_s for step in self.engine.steps if step.tokens == due and step.sequences == case.batch]


def _tokens(batch: Any) -> int:
    return sum(len(sequence.tokens) for sequence in batch.sequences)


if __name__ == "__main__":
    model, adapters, *numbers = sys.argv[1:]
    side = Side(Path(model), Path(adapters), *map(int, numbers))
    serve({"weights": side.runner.weights_backend}, side.answer)
