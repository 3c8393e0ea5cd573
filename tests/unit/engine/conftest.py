"""Tiny models of all families, runners for them, hand-made steps, and a scheduler driven event by event."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loraserve.adapter.pack import Slab, pack_peft
from loraserve.config import EngineConfig
from loraserve.engine.compute.runner import CpuRunner
from loraserve.engine.schedule.events import (
    AdapterLoaded,
    Emit,
    Event,
    EvictAdapter,
    Instruction,
    LoadAdapter,
    Reject,
    RequestArrived,
    RunStep,
    Sampled,
    SchedulerLimits,
    SequenceStep,
    StepBatch,
    StepDone,
    StepFailed,
    StepResult,
)
from loraserve.engine.schedule.scheduler import Scheduler
from loraserve.messages import AdapterRef, Admit
from loraserve.messages.sampling import SamplingParams
from loraserve.model_shape import read_model_config, shape_from_config
from loraserve.testing.engine.offline import install_slab
from loraserve.testing.tiny_model import write_peft_adapter, write_tiny_model

FAMILY_FIELDS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-5},
    "mistral": {"num_key_value_heads": 1, "sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 24},
}
SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 32}
"""Fields of a model that is small enough for Triton's interpreter, which is slow for each head."""
GREEDY = SamplingParams(max_tokens=64, temperature=0.0)
EOS = 0
UNIT = 4096
"""Bytes of the smallest extent; ``adapter`` makes slabs of a multiple."""


def adapter(version: str, units: int = 1) -> AdapterRef:
    return AdapterRef(name=f"name-{version}", version=version, rank=8, slab_bytes=UNIT * units)


class Desk:
    """A scheduler with its steps and loads under way, and each request's output. Validates after every event."""

    def __init__(self, **limits: Any) -> None:
        settings: dict[str, Any] = {
            "kv_blocks": 16,
            "block_tokens": 4,
            "pool_bytes": 2 * UNIT,
            "max_adapters": 8,
            "max_running": 4,
            "max_waiting": 8,
            "max_step_tokens": 16,
            "max_model_tokens": 48,
            "eos_token_ids": frozenset([EOS]),
        }
        self.scheduler = Scheduler(SchedulerLimits(**{**settings, **limits}))
        self.now = 0.0
        self.steps: deque[StepBatch] = deque()
        self.loads: list[str] = []
        self.output: dict[str, list[int]] = {}
        self.finish: dict[str, str] = {}
        self.cached: dict[str, int] = {}
        self.rejected: dict[str, Reject] = {}

    def tell(self, event: Event) -> list[Instruction]:
        self.now += 1.0
        instructions = self.scheduler.handle(event, self.now)
        for instruction in instructions:
            self._note(instruction)
        self.scheduler.validate()
        return instructions

    def arrive(
        self, name: str, prompt: Sequence[int], to: AdapterRef | None = None, generated: int = 0, **sampling: Any
    ) -> None:
        self.output[name] = []
        params = SamplingParams(**{"max_tokens": 8, **sampling})
        admit = Admit(
            request_id=name,
            gateway="g",
            prompt_tokens=tuple(prompt),
            sampling=params,
            adapter=to,
            generated=generated,
        )
        self.tell(RequestArrived(admit))

    def step_done(self, token: int = 7, **tokens: int) -> list[Instruction]:
        """Finish the oldest step. Every sequence samples ``token``, except those named in ``tokens``."""
        step = self.steps.popleft()
        drawn = [
            Sampled(request_id=s.request_id, token=tokens.get(s.request_id, token)) for s in step.sequences if s.sample
        ]
        return self.tell(StepDone(StepResult(step_id=step.step_id, sampled=tuple(drawn), duration_s=0.01)))

    def step_failed(self) -> list[Instruction]:
        return self.tell(StepFailed(self.steps.popleft().step_id, "boom"))

    def loaded(self, version: str) -> list[Instruction]:
        self.loads.remove(version)
        return self.tell(AdapterLoaded(version))

    @property
    def step(self) -> StepBatch | None:
        """The step that was sent last."""
        return self.steps[-1] if self.steps else None

    def part(self, name: str) -> SequenceStep:
        assert self.step is not None, "no step is in flight"
        return next(s for s in self.step.sequences if s.request_id == name)

    @property
    def sizes(self) -> dict[str, int]:
        """The number of tokens by request in the step that was sent last; empty without a step."""
        return {s.request_id: len(s.tokens) for s in self.step.sequences} if self.step else {}

    def _note(self, instruction: Instruction) -> None:
        match instruction:
            case RunStep(batch):
                assert len(self.steps) <= self.scheduler.limits.steps_ahead, "too many steps in flight"
                self.steps.append(batch)
            case LoadAdapter(adapter=wanted):
                self.loads.append(wanted.version)
            case EvictAdapter(version=version) if version in self.loads:
                self.loads.remove(version)
            case Reject(request_id):
                self.rejected[request_id] = instruction
            case Emit(_, delta):
                self.output[delta.request_id].extend(delta.tokens)
                if delta.index == 0:
                    self.cached[delta.request_id] = delta.cached_tokens
                if delta.finish is not None:
                    self.finish[delta.request_id] = delta.finish


class Stream:
    """One sequence driven by hand: its prompt in chunks, then its output token by token."""

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


def drive(runner: CpuRunner, streams: Sequence[Stream], tokens: int, chunks: Sequence[int]) -> None:
    """Run all streams together until each has ``tokens`` more tokens; ``chunks`` are their prompts' chunk sizes.

    Keeps the logits of every sampled token. Each step is computed twice and writes the same KV again.
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


def install(runner: Any, directories: Sequence[Path]) -> None:
    """Pack the adapters into the pool one after the other, and install them in slots 0, 1, and so on."""
    offset = 0
    for slot, directory in enumerate(directories):
        slab = pack_peft(directory, runner.shape, runner.slab_dtype, 256)
        install_slab(runner, slot, slab, offset)
        offset += -(-len(slab.data) // 4096) * 4096


def reference_logits(model_dir: Path, adapter: Path | None, known: list[int], outputs: int) -> torch.Tensor:
    """Return the logits of transformers and peft for the last ``outputs`` tokens of ``known``, [outputs, vocab]."""
    import peft
    import transformers

    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    model = load(model_dir, dtype=torch.float32)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(torch.tensor([known[:-1]])).logits[0]
    return logits[-outputs:]


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write a tiny model directory per family, and a ``small`` one."""
    root = tmp_path_factory.mktemp("models")
    for seed, (family, fields) in enumerate(FAMILY_FIELDS.items()):
        write_tiny_model(root / family, family, seed, **fields)
    write_tiny_model(root / "small", "llama", **SMALL)
    return {family: root / family for family in (*FAMILY_FIELDS, "small")}


@pytest.fixture(scope="session")
def strong_slab(model_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Slab]:
    """Return a function that packs a float32 slab for a model, strong enough to change the sampled tokens."""

    @cache
    def make(model: str) -> Slab:
        shape = shape_from_config(read_model_config(model_dirs[model]))
        folder = write_peft_adapter(tmp_path_factory.mktemp("strong"), shape, rank=8, strength=4.0)
        return pack_peft(folder, shape, "float32", 64)

    return make


@pytest.fixture
def make_adapters(tmp_path: Path) -> Callable[[CpuRunner], list[Path]]:
    """Return a function that writes three PEFT directories for a runner's model.

    They have all targets; only q and v; and a rank_pattern with rsLoRA. Their values are bfloat16, so that slabs of any
    dtype hold them exactly.
    """

    def make(runner: CpuRunner) -> list[Path]:
        pattern = {"q_proj": 2, "layers.1.mlp.down_proj": 24, "k_proj": 5}
        write = partial(write_peft_adapter, shape=runner.shape, dtype="bfloat16")
        return [
            write(tmp_path / "all", rank=8, seed=1),
            write(tmp_path / "qv", rank=4, targets=["q_proj", "v_proj"], alpha=8, seed=2),
            write(tmp_path / "mixed", rank=16, rank_pattern=pattern, rslora=True, alpha=4, seed=3),
        ]

    return make


@pytest.fixture
def make_runner(model_dirs: dict[str, Path]) -> Iterator[Callable[..., CpuRunner]]:
    """Return a function that makes a small CpuRunner. torch's number of threads is restored afterwards."""
    before = torch.get_num_threads()

    def make(family: str = "llama", threads: int = 1, **engine: Any) -> CpuRunner:
        settings = {"slab_dtype": "float32", "weights": "float32", "pool_bytes": 4 << 20, "kv_bytes": 4 << 20}
        return CpuRunner(model_dirs[family], EngineConfig(**{**settings, **engine}), threads, lambda text: None)

    yield make
    torch.set_num_threads(before)


@pytest.fixture
def make_cuda_runner(model_dirs: dict[str, Path]) -> Iterator[Callable[..., Any]]:
    """Return a function that makes a CudaRunner over the small model, on a GPU if there is one.

    It is not warmed up and has no captured graphs. Each takes a tenth of a GPU's memory beside the earlier ones.
    Without a GPU one thread computes, as every tiny operation would wait for the others on a busy machine.
    """
    pytest.importorskip("triton", reason="the CUDA runner needs triton")
    from loraserve.engine.cuda.runner import load_cuda_runner

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(1)

    tenths = count(1)

    def make(progress: Callable[[str], None] = lambda text: None, **engine: Any) -> Any:
        settings = {
            "slab_dtype": "float32", "max_running": 8, "max_adapters": 3, "max_step_tokens": 16, "max_rank": 8,
            "kv_bytes": 1 << 20, "pool_bytes": 1 << 20, "memory_fraction": next(tenths) / 10,
        }  # fmt: skip
        return load_cuda_runner(model_dirs["small"], EngineConfig(**{**settings, **engine}), device, progress)

    yield make
    torch.set_num_threads(before)


@pytest.fixture
def helpers() -> SimpleNamespace:
    """Return the helpers that this folder's tests share, because test files do not import each other."""
    return SimpleNamespace(
        Stream=Stream, drive=drive, install=install, reference_logits=reference_logits, Desk=Desk, adapter=adapter,
        UNIT=UNIT, EOS=EOS,
    )  # fmt: skip
