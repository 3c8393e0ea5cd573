"""transformers + peft in float32, which runs one adapter at a time: one ``generate`` for each adapter's requests.

Answers {"batch", "adapters", "tokens"} with the seconds of each step, in which every sequence gets one more token.
"""

import itertools
import sys
import time
from pathlib import Path
from typing import Any

import torch
from harness.cases import PROMPT_TOKENS, Case, adapter_name, adapter_of, prompt
from harness.worker import serve
from peft import PeftModel
from transformers import AutoModelForCausalLM, StoppingCriteria
from transformers.utils import logging


class StepTimes(StoppingCriteria):
    """Records the time of every step, and never stops the generation."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times_s.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Side:
    def __init__(self, model: Path, adapters: Path, threads: int, steps: int, count: int) -> None:
        self.steps = steps
        torch.set_num_threads(threads)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        base.eval()
        # A PeftModel needs at least one adapter, even if none is used.
        folders = [adapters / adapter_name(index) for index in range(max(1, count))]
        self.vocab = base.config.vocab_size
        self.model = PeftModel.from_pretrained(base, folders[0], adapter_name=_key(folders[0].name))
        for folder in folders[1:]:
            self.model.load_adapter(folder, _key(folder.name))
        self.model.eval()
        self.seed = 0

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        case = Case(question["batch"], question["adapters"], question["tokens"])
        self.seed += 1
        groups: dict[str, list[int]] = {}
        for sequence in range(case.batch):
            groups.setdefault(adapter_of(case, sequence), []).append(sequence)
        runs = [self._generate(name, sequences, case) for name, sequences in groups.items()]
        # One more token for every sequence takes one step of each group.
        return {"steps_s": [sum(steps) for steps in zip(*runs, strict=True)]}

    def _generate(self, adapter: str, sequences: list[int], case: Case) -> list[float]:
        decode = case.tokens == 1
        length = PROMPT_TOKENS if decode else case.tokens
        inputs = torch.tensor([prompt(index, length, self.vocab, self.seed) for index in sequences])
        if not adapter:
            with self.model.disable_adapter():
                return self._timed(inputs, decode)
        self.model.set_adapter(_key(adapter))
        return self._timed(inputs, decode)

    def _timed(self, inputs: torch.Tensor, decode: bool) -> list[float]:
        times = StepTimes()
        count = self.steps if decode else 1
        started_s = time.perf_counter()
        generate: Any = self.model.generate
        with torch.inference_mode():
            generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                do_sample=False,
                min_new_tokens=count,
                max_new_tokens=count,
                stopping_criteria=[times],
                pad_token_id=0,
            )
        if not decode:
            return [times.times_s[0] - started_s]
        return [after - before for before, after in itertools.pairwise(times.times_s)]


def _key(name: str) -> str:
    """Return a name without dots, which module names must not contain."""
    return name.replace(".", "_")


if __name__ == "__main__":
    model, adapters, *numbers = sys.argv[1:]
    side = Side(Path(model), Path(adapters), *map(int, numbers))
    serve({"weights": "float32"}, side.answer)
