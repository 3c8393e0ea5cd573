"""Computes the expected output: the greedy output of a single undisturbed engine for each prompt."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
from harness.report import say

from loraserve.adapter.pack import Slab, pack_peft
from loraserve.config import Config
from loraserve.demo import demo_adapters
from loraserve.demo.paths import default_data_dir
from loraserve.device import core_count
from loraserve.gateway.text.detokenize import TokenBytes
from loraserve.gateway.text.tokenizer import ModelTokenizer
from loraserve.messages import SamplingParams
from loraserve.model_shape import ModelShape
from loraserve.testing.engine.offline import OfflineEngine, OfflineRequest
from loraserve.testing.tiny_model import write_peft_adapter

RANKS = (8, 8, 16, 16, 24, 24, 32, 32)
"""Ranks of the random adapters on all seven projections, beside the demo's four: 5 to 20 MB each."""
PROMPTS = 6
PROMPT_TOKENS = (6, 30)
OUTPUT_TOKENS = (8, 16)


class Case(NamedTuple):
    """A prompt for an adapter, and its expected tokens and their text."""

    adapter: str
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str = ""


def write_adapters(folder: Path, shape: ModelShape) -> dict[str, Path]:
    """Write the demo adapters and random adapters whose outputs differ."""
    found = {adapter.name: adapter.path for adapter in demo_adapters(default_data_dir(), say)}
    for number, rank in enumerate(RANKS):
        name = f"random-{number}-r{rank}"
        found[name] = write_peft_adapter(
            folder / name, shape, rank, alpha=rank, seed=number, strength=0.3, dtype="bfloat16"
        )
    return found


def compute_truth(config: Config, shape: ModelShape, folders: Mapping[str, Path]) -> list[Case]:
    """Return the cases of all adapters.

    An engine's logits do not depend on the batch or the number of threads, so outputs can be compared exactly.
    """
    engine = msgspec.structs.replace(config.engine, threads=core_count(), pool_bytes=512 << 20)
    config = msgspec.structs.replace(config, engine=engine)
    slabs = {name: pack_peft(path, shape, engine.slab_dtype, engine.max_rank) for name, path in folders.items()}
    cases = _compute(OfflineEngine(config, slabs), slabs, shape.vocab)
    token_bytes = ModelTokenizer(Path(config.model.path)).token_bytes
    return [case._replace(text=_text(case, token_bytes)) for case in cases]


def _text(case: Case, token_bytes: TokenBytes) -> str:
    # As in the gateway, each token is fed alone and special tokens are left out.
    detokenizer = token_bytes.detokenizer(skip_special_tokens=True)
    return "".join(detokenizer.feed([token]) for token in case.tokens) + detokenizer.flush()


def _compute(engine: OfflineEngine, slabs: Mapping[str, Slab], vocab: int) -> list[Case]:
    asked = [
        OfflineRequest(
            prompt=_prompt(number, vocab),
            sampling=SamplingParams(max_tokens=_between(OUTPUT_TOKENS, number), temperature=0.0, ignore_eos=True),
            adapter=adapter,
        )
        for adapter in slabs
        for number in range(PROMPTS)
    ]
    outputs = engine.generate(asked)
    return distinct([Case(a.adapter, a.prompt, tuple(o.tokens)) for a, o in zip(asked, outputs, strict=True)])


def distinct(cases: Sequence[Case]) -> list[Case]:
    """Return the cases whose output no other adapter has: only these reveal a mix-up of adapters."""
    said: dict[tuple[tuple[int, ...], tuple[int, ...]], list[Case]] = {}
    for case in cases:
        said.setdefault((case.prompt, case.tokens), []).append(case)
    return [same[0] for same in said.values() if len(same) == 1]


def _between(bounds: tuple[int, int], number: int) -> int:
    low, high = bounds
    return low + (high - low) * number // max(1, PROMPTS - 1)


def _prompt(number: int, vocab: int) -> tuple[int, ...]:
    return tuple((37 * place + 101 * number) % (vocab - 200) + 100 for place in range(_between(PROMPT_TOKENS, number)))
