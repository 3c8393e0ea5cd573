"""The offline engine on a tiny model: the scheduler and the runner are the real ones."""

from collections.abc import Iterator

import pytest
import torch

from loraserve.adapter.pack import Slab, pack_peft
from loraserve.config import Config, EngineConfig, ModelConfig
from loraserve.messages import SamplingParams
from loraserve.testing.engine.offline import OfflineEngine, OfflineRequest
from loraserve.testing.tiny_model import write_peft_adapter, write_tiny_model

PROMPT = tuple(range(5, 25))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OfflineEngine]:
    root = tmp_path_factory.mktemp("offline")
    shape = write_tiny_model(root / "model", "llama")
    slabs: dict[str, Slab] = {}
    for seed, rank in enumerate((4, 16, 24)):
        folder = write_peft_adapter(root / f"r{rank}", shape, rank, seed=seed, strength=2.0)
        slabs[f"r{rank}"] = pack_peft(folder, shape, "float32", 64)
    settings = EngineConfig(
        slab_dtype="float32",
        weights="float32",
        threads=1,
        kv_bytes=2 << 20,
        pool_bytes=2 * max(slab.header.slab_bytes for slab in slabs.values()),
        max_step_tokens=16,
        max_running=8,
    )
    before = torch.get_num_threads()
    yield OfflineEngine(Config(model=ModelConfig(path=str(root / "model")), engine=settings), slabs)
    torch.set_num_threads(before)


def request(adapter: str, tokens: int = 12, prompt: tuple[int, ...] = PROMPT) -> OfflineRequest:
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    return OfflineRequest(prompt=prompt, sampling=sampling, adapter=adapter)


def test_a_mixed_batch_equals_solo_runs(engine: OfflineEngine) -> None:
    names = ["", "r4", "r16", "r4"]
    together = engine.generate([request(name) for name in names])
    alone = [engine.generate([request(name)])[0] for name in names]
    assert [output.tokens for output in together] == [output.tokens for output in alone]
    assert len({tuple(output.tokens) for output in together}) == 3, "base, r4 and r16 differ"
    assert all(output.finish == "length" and not output.error for output in together)


def test_every_token_has_its_time_and_every_step_its_record(engine: OfflineEngine) -> None:
    (output,) = engine.generate([request("r16", prompt=(9,) * 40)])
    assert len(output.times_s) == len(output.tokens) == 12
    assert output.times_s == sorted(output.times_s)
    assert output.times_s[0] > 0
    # 40 prompt tokens in chunks of at most 16, then one token a step.
    assert [step.tokens for step in engine.steps] == [16, 16, 8] + [1] * 11
    assert all(step.duration_s > 0 for step in engine.steps)


def test_adapters_are_evicted_in_a_small_pool(engine: OfflineEngine) -> None:
    first = engine.generate([request("r24")])[0]
    engine.generate([request("r16"), request("r4")])
    again = engine.generate([request("r24"), request("r16"), request("r4")])
    assert again[0].tokens == first.tokens
    engine.scheduler.validate()


def test_a_refused_request_says_why(engine: OfflineEngine) -> None:
    too_long, fine = engine.generate([request("", prompt=(3,) * 600), request("")])
    assert too_long.error.startswith("context_length: ")
    assert not too_long.tokens
    assert len(fine.tokens) == 12


def test_before_step_sees_every_batch(engine: OfflineEngine) -> None:
    seen: list[int] = []
    engine.generate([request("r4"), request("")], before_step=lambda batch: seen.append(len(batch.sequences)))
    assert seen == [step.sequences for step in engine.steps]
    assert max(seen) == 2


def test_an_unknown_adapter_is_named(engine: OfflineEngine) -> None:
    with pytest.raises(ValueError, match="'nobody' is not one of"):
        engine.generate([request("nobody")])
