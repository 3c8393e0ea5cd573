"""The cases of the engine bench: batch size, number of adapters and ranks."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from loraserve.model_shape import ModelShape
from loraserve.testing.tiny_model import write_peft_adapter

RANKS = (8, 16, 32, 64)
ADAPTERS = 16
BATCHES = (1, 4, 16)
ADAPTER_COUNTS = (0, 1, 4, 16)
PREFILL_TOKENS = 512
PROMPT_TOKENS = 112
STRENGTH = 0.05
"""Of the random adapters. It is small: their cost depends only on their ranks."""


class Case(NamedTuple):
    """One case. ``tokens`` is 1 for a decode step, else the length of a prompt to prefill."""

    batch: int
    adapters: int
    tokens: int = 1

    @property
    def name(self) -> str:
        if self.tokens > 1:
            return f"prefill{self.tokens}_{self.adapters}adapters"
        return f"b{self.batch}_{self.adapters}adapters"


def all_cases() -> list[Case]:
    """Return every batch size with every number of adapters up to it, and a prefill with none and one."""
    decode = [Case(b, n) for b in BATCHES for n in ADAPTER_COUNTS if n <= b]
    return [*decode, Case(1, 0, PREFILL_TOKENS), Case(1, 1, PREFILL_TOKENS)]


def most_adapters(cases: Iterable[Case]) -> int:
    """Return the largest number of adapters in any case, which a side must load."""
    return max(case.adapters for case in cases)


def adapter_name(index: int) -> str:
    return f"r{RANKS[index % len(RANKS)]}-{index}"


def adapter_of(case: Case, sequence: int) -> str:
    """Return the adapter of a sequence, round robin; "" is the base model."""
    return adapter_name(sequence % case.adapters) if case.adapters else ""


def prompt(sequence: int, tokens: int, vocab: int, seed: int = 0) -> tuple[int, ...]:
    """Return arbitrary tokens. The cost of a step does not depend on their values."""
    return tuple(100 + (31 * seed + 13 * sequence + 7 * position) % (vocab - 200) for position in range(tokens))


def write_adapters(folder: Path, shape: ModelShape, count: int = ADAPTERS) -> dict[str, Path]:
    """Write ``count`` random PEFT folders on all seven projections, unless they exist."""
    folders = {}
    for index in range(count):
        name = adapter_name(index)
        folders[name] = folder / name
        if not (folder / name / "adapter_model.safetensors").exists():
            rank = RANKS[index % len(RANKS)]
            write_peft_adapter(folder / name, shape, rank, seed=index, strength=STRENGTH, dtype="bfloat16")
    return folders
