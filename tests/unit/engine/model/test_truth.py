"""The engine's model against transformers and peft: all families, mixed adapters in one batch, prompts in chunks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
TOKENS = 12


def mixed_streams(stream_type: Any, seed: int = 0) -> list[Any]:
    """Return streams for the base model and three adapters, with odd prompt lengths and scattered blocks."""
    generator = torch.Generator().manual_seed(seed)
    lengths = {"base": 5, "all": 41, "qv": 16, "mixed": 33, "all again": 17}
    slots = {"base": -1, "all": 0, "qv": 1, "mixed": 2, "all again": 0}
    blocks = torch.randperm(5 * len(lengths), generator=generator).view(len(lengths), 5).tolist()
    return [
        stream_type(name, torch.randint(3, 320, (length,), generator=generator).tolist(), table, slots[name])
        for (name, length), table in zip(lengths.items(), blocks, strict=True)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_in_chunks_equals_transformers_and_peft(
    family: str, helpers: Any, make_runner: Any, make_adapters: Callable[..., list[Path]], model_dirs: dict[str, Path]
) -> None:
    runner = make_runner(family)
    adapters = make_adapters(runner)
    helpers.install(runner, adapters)
    streams = mixed_streams(helpers.Stream)

    helpers.drive(runner, streams, TOKENS, chunks=(8, 7, 16, 33, 3))

    outputs = {}
    for stream in streams:
        expected = helpers.reference_logits(
            model_dirs[family], None if stream.slot < 0 else adapters[stream.slot], stream.known, len(stream.output)
        )
        difference = (torch.stack(stream.logits) - expected).abs().max().item()
        assert difference < 1e-4, f"{stream.name}: logits differ by {difference}"
        assert stream.output == expected.argmax(-1).tolist()
        outputs[stream.name] = tuple(stream.output)
    assert len(set(outputs.values())) == len(outputs), "the adapters must change the output"
    assert len({token for output in outputs.values() for token in output}) > 2 * TOKENS, "greedy tokens must vary"


@pytest.mark.parametrize("family", FAMILIES)
def test_fp16_weights_stay_near_transformers(
    family: str, helpers: Any, make_runner: Any, make_adapters: Callable[..., list[Path]], model_dirs: dict[str, Path]
) -> None:
    runner = make_runner(family, weights="fp16", slab_dtype="bfloat16")
    adapters = make_adapters(runner)
    helpers.install(runner, adapters)
    streams = mixed_streams(helpers.Stream)

    helpers.drive(runner, streams, 4, chunks=(8, 7, 16, 33, 3))

    assert runner.weights_backend == "fp16"
    for stream in streams:
        adapter = None if stream.slot < 0 else adapters[stream.slot]
        expected = helpers.reference_logits(model_dirs[family], adapter, stream.known, len(stream.output))
        difference = (torch.stack(stream.logits) - expected).abs().max().item()
        spread = expected.std().item()
        print(f"{family} {stream.name}: logits differ by at most {difference:.1e}, their deviation is {spread:.1f}")
        assert difference < 2e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_fp16_streams_have_the_same_bits_alone_and_together(
    family: str, helpers: Any, make_runner: Any, make_adapters: Callable[..., list[Path]]
) -> None:
    runner = make_runner(family, weights="fp16", slab_dtype="bfloat16", threads=2)
    adapters = make_adapters(runner)
    helpers.install(runner, adapters)
    together = mixed_streams(helpers.Stream)
    helpers.drive(runner, together, TOKENS, chunks=(8, 7, 16, 33, 3))

    for stream in together:
        solo_runner = make_runner(family, weights="fp16", slab_dtype="bfloat16", threads=1)
        helpers.install(solo_runner, adapters)
        alone = helpers.Stream(stream.name, stream.prompt, range(20, 25), stream.slot)
        helpers.drive(solo_runner, [alone], TOKENS, chunks=(64,))
        assert alone.output == stream.output
        assert torch.equal(torch.stack(alone.logits), torch.stack(stream.logits)), stream.name
