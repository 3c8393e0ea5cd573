"""Tiny models of every family, a runner over each, and hand-made steps for them."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loraserve.adapter.pack import pack_peft
from loraserve.config import EngineConfig
from loraserve.engine.batch import SequenceStep, StepBatch
from loraserve.engine.runner import ModelRunner
from loraserve.messages.base import SamplingParams
from loraserve.testing.tiny_model import write_peft_adapter, write_tiny_model

FAMILY_FIELDS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-5},
    "mistral": {"num_key_value_heads": 1, "sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 24},
}
GREEDY = SamplingParams(max_tokens=64, temperature=0.0)


class Stream:
    """One sequence driven by hand: its prompt goes in chunks, then its own tokens one by one."""

    def __init__(
        self, name: str, prompt: Sequence[int], blocks: Sequence[int], slot: int = -1, sampling: SamplingParams = GREEDY
    ) -> None:
        self.name = name
        self.prompt = list(prompt)
        self.known = list(prompt)
        self.blocks = tuple(blocks)
        self.slot = slot
        self.sampling = sampling
        self.computed = 0
        self.logits: list[torch.Tensor] = []

    @property
    def output(self) -> list[int]:
        return self.known[len(self.prompt) :]

    def next(self, chunk: int) -> SequenceStep:
        stop = min(self.computed + chunk, len(self.known))
        return SequenceStep(
            request_id=self.name,
            tokens=tuple(self.known[self.computed : stop]),
            start=self.computed,
            blocks=self.blocks,
            sampling=self.sampling,
            prompt_length=len(self.prompt),
            slot=self.slot,
            sample=stop == len(self.known),
            output_index=len(self.output),
            history=self.known,
        )


def drive(runner: ModelRunner, streams: Sequence[Stream], tokens: int, chunks: Sequence[int]) -> None:
    """Run all streams together, each prompt in chunks of its own size, until each has ``tokens`` more tokens.

    Keeps the logits behind every token. A step may be repeated: it writes the same KV again.
    """
    step_id = 0
    while any(len(stream.output) < tokens for stream in streams):
        sequences = tuple(
            stream.next(chunk) for stream, chunk in zip(streams, chunks, strict=True) if len(stream.output) < tokens
        )
        batch = StepBatch(step_id=step_id, sequences=sequences)
        logits = iter(runner.logits(batch).clone())
        sampled = {s.request_id: s.token for s in runner.step(batch).sampled}
        by_name = {stream.name: stream for stream in streams}
        for sequence in sequences:
            stream = by_name[sequence.request_id]
            stream.computed += len(sequence.tokens)
            if sequence.sample:
                stream.logits.append(next(logits))
                stream.known.append(sampled[stream.name])
        step_id += 1


def install(runner: ModelRunner, directories: Sequence[Path]) -> None:
    """Pack each adapter into the pool, one behind the other, slot by slot."""
    offset = 0
    for slot, directory in enumerate(directories):
        slab = pack_peft(directory, runner.shape, runner.slab_dtype, 256)
        runner.pool_view()[offset : offset + len(slab.data)] = slab.data
        runner.install(slot, slab.header, offset * runner.pool_elements // len(runner.pool_view()))
        offset += -(-len(slab.data) // 4096) * 4096


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model directory by family."""
    root = tmp_path_factory.mktemp("models")
    for seed, (family, fields) in enumerate(FAMILY_FIELDS.items()):
        write_tiny_model(root / family, family, seed, **fields)
    return {family: root / family for family in FAMILY_FIELDS}


@pytest.fixture
def make_adapters(tmp_path: Path) -> Callable[[ModelRunner], list[Path]]:
    """Three PEFT directories for a runner's model: all targets, q and v alone, a rank_pattern with rsLoRA.

    Their values are bfloat16, so that slabs of any dtype hold them exactly.
    """

    def make(runner: ModelRunner) -> list[Path]:
        pattern = {"q_proj": 2, "layers.1.mlp.down_proj": 24, "k_proj": 5}
        write = partial(write_peft_adapter, shape=runner.shape, dtype="bfloat16")
        return [
            write(tmp_path / "all", rank=8, seed=1),
            write(tmp_path / "qv", rank=4, targets=["q_proj", "v_proj"], alpha=8, seed=2),
            write(tmp_path / "mixed", rank=16, rank_pattern=pattern, rslora=True, alpha=4, seed=3),
        ]

    return make


@pytest.fixture
def make_runner(model_dirs: dict[str, Path]) -> Iterator[Callable[..., ModelRunner]]:
    """A small runner; threads are set back afterwards, because torch keeps them."""
    before = torch.get_num_threads()

    def make(family: str = "llama", threads: int = 1, **engine: Any) -> ModelRunner:
        settings = {"slab_dtype": "float32", "weights": "float32", "pool_bytes": 4 << 20, "kv_bytes": 4 << 20}
        return ModelRunner(model_dirs[family], EngineConfig(**{**settings, **engine}), threads, lambda text: None)

    yield make
    torch.set_num_threads(before)


@pytest.fixture
def helpers() -> SimpleNamespace:
    """What the tests of this folder share; test files import nothing from each other."""
    return SimpleNamespace(Stream=Stream, drive=drive, install=install)
