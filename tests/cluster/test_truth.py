"""The whole engine compared with transformers + peft: scheduler, prefix cache, preemption, pool, kernels and sampler.

The base model and six adapters share every batch, prompts are computed in chunks, some prefixes are cached, and the KV
cache is so small that sequences are preempted. transformers and peft then compute each request alone and must choose
the same tokens.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers

from loraserve.adapter.pack import Slab, pack_peft
from loraserve.config import Config, EngineConfig, ModelConfig
from loraserve.engine.schedule.events import StepBatch
from loraserve.kernels import attention
from loraserve.messages import SamplingParams
from loraserve.model_shape import ModelShape, read_model_config, shape_from_config
from loraserve.testing.engine.offline import OfflineEngine, OfflineOutput, OfflineRequest
from loraserve.testing.peft_writer import PROJECTIONS
from loraserve.testing.tiny_model import write_peft_adapter, write_tiny_model

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "rms_norm_eps": 1e-5},
    "mistral": {"num_key_value_heads": 1, "sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 24},
}
MODELS = ("demo", *FAMILIES)
BASE = ""
QV = ("q_proj", "v_proj")
PATTERN = {"q_proj": 8, r"layers\.1\.mlp\.down_proj": 40, "k_proj": 12}
PROMPTS = ((45, 7), (23, 90))
"""The two prompts of each adapter: their length and their first token."""
TOKENS = 16
MAX_LOGIT_DIFFERENCE = 1e-3


class Adapters(NamedTuple):
    folders: Mapping[str, Path]
    slabs: Mapping[str, Slab]


class Truth:
    """The model in transformers and peft, in float32. It computes one request at a time."""

    def __init__(self, model_dir: Path, folders: Mapping[str, Path]) -> None:
        load: Any = transformers.AutoModelForCausalLM.from_pretrained
        first = next(iter(folders))
        self._model = peft.PeftModel.from_pretrained(load(model_dir, dtype=torch.float32), folders[first], first)
        for name, folder in folders.items():
            if name != first:
                self._model.load_adapter(folder, name)
        self._model.eval()
        self._computed: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}

    def logits(self, adapter: str, known: tuple[int, ...], outputs: int) -> torch.Tensor:
        """Return the logits that predict each of the last ``outputs`` tokens of ``known``, [outputs, vocab]."""
        if (adapter, known) not in self._computed:
            self._computed[adapter, known] = self._compute(adapter, known, outputs)
        return self._computed[adapter, known]

    def _compute(self, adapter: str, known: tuple[int, ...], outputs: int) -> torch.Tensor:
        with torch.inference_mode():
            tokens = torch.tensor([known[:-1]])
            if adapter == BASE:
                with self._model.disable_adapter():
                    return self._model(tokens).logits[0, -outputs:]
            self._model.set_adapter(adapter)
            return self._model(tokens).logits[0, -outputs:]


class Recorder:
    """Records the logits of every sampled token by request. It computes each batch a second time for them."""

    def __init__(self, engine: OfflineEngine) -> None:
        self._engine = engine
        self._rows: dict[str, dict[int, torch.Tensor]] = {}
        self.mixed = 0
        """The largest number of adapters in one batch, including the base model."""
        self.chunked = False

    def __call__(self, batch: StepBatch) -> None:
        logits = self._engine.runner.logits(batch)
        sampling = [sequence for sequence in batch.sequences if sequence.sample]
        for sequence, row in zip(sampling, logits, strict=True):
            self._rows.setdefault(sequence.request_id, {})[sequence.output_index] = row.clone()
        self.mixed = max(self.mixed, len({sequence.slot for sequence in batch.sequences}))
        self.chunked |= any(not sequence.sample for sequence in batch.sequences)

    def logits(self) -> list[torch.Tensor]:
        """Return one tensor [tokens, vocab] per request, in the order of arrival."""
        in_order = sorted(self._rows.items(), key=lambda item: int(item[0].rpartition("-")[2]))
        return [torch.stack([rows[index] for index in sorted(rows)]) for _, rows in in_order]


@pytest.fixture(scope="module", params=MODELS)
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family: str = request.param
    if family == "demo":
        return Path(request.getfixturevalue("demo_model"))
    folder = tmp_path_factory.mktemp("truth") / family
    write_tiny_model(folder, family, seed=1, **FAMILIES[family])
    return folder


@pytest.fixture(scope="module")
def adapters(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    """Write and pack six adapters: ranks 8 to 64 on all projections, one on q and v only, one with a rank_pattern."""
    shape, root = shape_from_config(read_model_config(model_dir)), tmp_path_factory.mktemp("adapters")
    kinds: dict[str, dict[str, Any]] = {
        "r8": {"rank": 8},
        "r16": {"rank": 16},
        "r32": {"rank": 32, "rslora": True, "alpha": 6},
        "r64": {"rank": 64},
        "qv": {"rank": 24, "targets": QV},
        "pattern": {"rank": 20, "rank_pattern": PATTERN},
    }
    folders = {}
    for seed, (name, options) in enumerate(kinds.items()):
        # bfloat16 holds these values exactly, so the default bfloat16 slabs have the same reference.
        options = {"targets": PROJECTIONS, "alpha": 16, **options}
        folders[name] = write_peft_adapter(root / name, shape, seed=seed, dtype="bfloat16", **options)
    return Adapters(folders, {name: pack_peft(folder, shape, "float32", 64) for name, folder in folders.items()})


def requests(shape: ModelShape, names: list[str]) -> list[OfflineRequest]:
    """Return two requests per name. All names have the same prompts, so that a wrongly shared prefix gives an error."""
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    return [
        OfflineRequest(prompt=prompt(length, first), sampling=sampling, adapter=name)
        for length, first in PROMPTS
        for name in names
    ]


def outputs_by_adapter(asked: list[OfflineRequest], outputs: list[OfflineOutput]) -> set[tuple[int, ...]]:
    """Return the distinct outputs of the adapters, each for all prompts."""
    names = {request.adapter for request in asked}
    pairs = list(zip(asked, outputs, strict=True))
    return {tuple(t for request, o in pairs if request.adapter == name for t in o.tokens) for name in names}


def prompt(length: int, first: int) -> tuple[int, ...]:
    return tuple((first + 37 * i + i * i) % 300 + 3 for i in range(length))


def engine_config(model_dir: Path, shape: ModelShape, kv_blocks: int, **settings: Any) -> Config:
    engine = EngineConfig(
        kv_bytes=kv_blocks * attention.block_bytes(shape, 16),
        pool_bytes=512 << 20 if shape.layers > 10 else 32 << 20,
        max_running=16,
        max_step_tokens=32,
        threads=2,
        **settings,
    )
    return Config(model=ModelConfig(path=str(model_dir)), engine=engine)


def test_base_and_six_adapters_in_one_batch_equal_transformers_and_peft(
    model_dir: Path, adapters: Adapters, measured: Callable[[str], None]
) -> None:
    shape = shape_from_config(read_model_config(model_dir))
    truth = Truth(model_dir, adapters.folders)
    config = engine_config(model_dir, shape, kv_blocks=34, weights="float32", slab_dtype="float32")
    engine = OfflineEngine(config, adapters.slabs)
    asked = requests(shape, [BASE, *adapters.folders])
    largest = 0.0
    cached = 0
    for turn in range(2):
        recorder = Recorder(engine)
        outputs = engine.generate(asked, recorder)
        cached += sum(output.cached_tokens for output in outputs)
        for request, output, logits in zip(asked, outputs, recorder.logits(), strict=True):
            expected = truth.logits(request.adapter, (*request.prompt, *output.tokens), TOKENS)
            assert output.tokens == expected.argmax(-1).tolist(), f"turn {turn}, adapter {request.adapter or 'none'}"
            largest = max(largest, (logits - expected).abs().max().item())
        assert recorder.mixed >= 7, "base and six adapters were never in one batch"
        assert recorder.chunked
        if turn == 0:
            assert engine.scheduler.counts.preemptions > 0, "no sequence was preempted"
            assert len(outputs_by_adapter(asked, outputs)) == 1 + len(adapters.folders), (
                "two adapters have the same outputs"
            )
    engine.scheduler.validate()
    assert cached > 0, "no prefix was found in the cache"
    measured(
        f"{model_dir.name}: {2 * len(asked)} requests of {TOKENS} tokens equal, logits within {largest:.1e}; "
        f"{engine.scheduler.counts.preemptions} preemptions, {cached} tokens from the prefix cache"
    )
    assert largest < MAX_LOGIT_DIFFERENCE


def test_agreement_of_the_default_weights_is_measured(
    model_dir: Path, adapters: Adapters, measured: Callable[[str], None]
) -> None:
    """The default is fp16 weights, if the processor supports them, and bfloat16 slabs."""
    shape = shape_from_config(read_model_config(model_dir))
    truth = Truth(model_dir, adapters.folders)
    engine = OfflineEngine(
        engine_config(model_dir, shape, kv_blocks=200),
        {name: pack_peft(folder, shape, "bfloat16", 64) for name, folder in adapters.folders.items()},
    )
    asked = requests(shape, [BASE, *adapters.folders])
    recorder = Recorder(engine)
    same, largest = 0, 0.0
    outputs = engine.generate(asked, recorder)
    for request, output, logits in zip(asked, outputs, recorder.logits(), strict=True):
        expected = truth.logits(request.adapter, (*request.prompt, *output.tokens), TOKENS)
        same += int((torch.tensor(output.tokens) == expected.argmax(-1)).sum())
        largest = max(largest, (logits - expected).abs().max().item())
    chosen = TOKENS * len(asked)
    share = same / chosen
    measured(
        f"{model_dir.name}, {engine.runner.weights_backend} weights: {share:.1%} of {chosen} greedy tokens agree with "
        f"float32, logits within {largest:.1e}"
    )
    assert share >= 0.97
