"""Steps ahead on a real model give the same tokens as one step at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from loraserve.adapter.pack import Slab, pack_peft
from loraserve.config import Config, EngineConfig, ModelConfig
from loraserve.engine.schedule.events import PENDING_TOKEN, StepBatch
from loraserve.engine.setup import build_runner
from loraserve.kernels import attention
from loraserve.messages import SamplingParams
from loraserve.testing.engine.ahead import StepsAheadRunner
from loraserve.testing.engine.offline import OfflineEngine, OfflineRequest
from loraserve.testing.tiny_model import write_peft_adapter, write_tiny_model

BLOCKS = 16


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Config, dict[str, Slab]]]:
    """Return a tiny model with KV memory for a few requests and a pool for two of three adapters."""
    root: Path = tmp_path_factory.mktemp("ahead")
    shape = write_tiny_model(root / "model", "llama")
    slabs: dict[str, Slab] = {}
    for seed, rank in enumerate((4, 16, 24)):
        folder = write_peft_adapter(root / f"r{rank}", shape, rank, seed=seed, strength=2.0)
        slabs[f"r{rank}"] = pack_peft(folder, shape, "float32", 64)
    settings = EngineConfig(
        slab_dtype="float32",
        weights="float32",
        threads=1,
        kv_bytes=BLOCKS * attention.block_bytes(shape, EngineConfig().block_tokens),
        pool_bytes=2 * max(slab.header.slab_bytes for slab in slabs.values()),
        max_step_tokens=24,
        max_running=8,
    )
    before = torch.get_num_threads()
    yield Config(model=ModelConfig(path=str(root / "model")), engine=settings), slabs
    torch.set_num_threads(before)


def requests() -> list[OfflineRequest]:
    """Return greedy and sampled requests, with and without penalties, for all adapters, with short and long prompts."""
    base = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    kinds = [
        base,
        msgspec.structs.replace(base, temperature=0.9, seed=3, logprobs=2),
        msgspec.structs.replace(base, frequency_penalty=0.7, presence_penalty=0.3),
        msgspec.structs.replace(base, temperature=0.7, seed=4, min_tokens=6, ignore_eos=False),
    ]
    return [
        OfflineRequest(
            prompt=tuple(range(5 + index, 5 + index + (9, 30, 57)[index % 3])),
            sampling=kinds[index % len(kinds)],
            adapter=("", "r4", "r16", "r24")[index // 2 % 4],
        )
        for index in range(10)
    ]


@pytest.mark.parametrize("steps_ahead", [1, 2])
def test_a_mixed_batch_gets_the_same_tokens_as_one_step_at_a_time(
    world: tuple[Config, dict[str, Slab]], steps_ahead: int
) -> None:
    config, slabs = world
    expected = OfflineEngine(config, slabs).generate(requests())
    runner: Any = StepsAheadRunner(build_runner(config, lambda text: None), steps_ahead)
    engine = OfflineEngine(config, slabs, runner)
    drawn = 0

    def count(batch: StepBatch) -> None:
        nonlocal drawn
        drawn += sum(part.tokens == (PENDING_TOKEN,) for part in batch.sequences)

    outputs = engine.generate(requests(), before_step=count)
    assert [(o.tokens, o.finish, o.error) for o in outputs] == [(o.tokens, o.finish, o.error) for o in expected]
    engine.scheduler.validate()
    counters = engine.scheduler.counters()
    assert counters.preemptions > 0, "blocks never ran out"
    assert drawn > 100, "most decodes go ahead"
    assert len(engine.steps) == counters.steps
    assert all(step.duration_s > 0 for step in engine.steps)


def test_the_next_step_is_submitted_before_the_last_result_is_read(world: tuple[Config, dict[str, Slab]]) -> None:
    config, slabs = world
    runner: Any = StepsAheadRunner(build_runner(config, lambda text: None), 1)
    engine = OfflineEngine(config, slabs, runner)
    done: list[int] = []
    engine.generate(requests()[:1], before_step=lambda batch: done.append(len(engine.steps)))
    assert done == [max(0, step - 1) for step in range(len(done))]


def test_a_migrated_request_gets_the_tokens_that_its_first_engine_would_have_drawn(
    world: tuple[Config, dict[str, Slab]],
) -> None:
    """Greedy and sampled requests, with and without penalties and adapters, are cut at every third token."""
    config, slabs = world
    engine = OfflineEngine(config, slabs)
    whole = engine.generate(requests())
    for cut in range(1, 40, 3):
        rest = [
            msgspec.structs.replace(request, prompt=(*request.prompt, *output.tokens[:cut]), generated=cut)
            for request, output in zip(requests(), whole, strict=True)
            if len(output.tokens) > cut
        ]
        expected = [output.tokens[cut:] for output in whole if len(output.tokens) > cut]
        assert [output.tokens for output in engine.generate(rest)] == expected
