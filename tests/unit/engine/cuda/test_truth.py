"""The CUDA runner compared with transformers and peft, on a GPU or in Triton's interpreter.

The interpreter runs the same code, except for streams and captured graphs.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loraserve.config import EngineConfig
from loraserve.engine.schedule.events import PENDING_TOKEN, StepBatch
from loraserve.messages.sampling import SamplingParams
from loraserve.testing.tiny_model import write_peft_adapter

pytest.importorskip("triton", reason="the CUDA runner needs triton")

from loraserve.engine.cuda.runner import CudaRunner, load_cuda_runner

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
TOKENS = 3
GREEDY = SamplingParams(max_tokens=TOKENS, temperature=0.0)
LENGTHS = {"base": 5, "all": 41, "qv": 16, "mixed": 33, "wide": 9, "all again": 17}
SLOTS = {"base": -1, "all": 0, "qv": 1, "mixed": 2, "wide": 3, "all again": 0}


def make_cuda_runner(model_dir: Path, **engine: Any) -> CudaRunner:
    settings = {
        "slab_dtype": "float32", "max_running": 8, "max_adapters": 4, "max_step_tokens": 96, "max_rank": 48,
        "kv_bytes": 4 << 20, "pool_bytes": 4 << 20, "memory_fraction": 0.1,
    }  # fmt: skip
    runner = load_cuda_runner(model_dir, EngineConfig(**{**settings, **engine}), DEVICE, lambda text: None)
    if DEVICE.type == "cuda":
        runner.warm_up(lambda text: None)
    return runner


def four_adapters(runner: CudaRunner, folder: Path) -> list[Path]:
    """Write adapters: all targets, only q and v, a rank_pattern with rsLoRA, and a large one."""
    pattern = {"q_proj": 2, "layers.1.mlp.down_proj": 24, "k_proj": 5}
    kinds: dict[str, dict[str, Any]] = {
        "all": {"rank": 8},
        "qv": {"rank": 4, "targets": ["q_proj", "v_proj"], "alpha": 8},
        "mixed": {"rank": 16, "rank_pattern": pattern, "rslora": True, "alpha": 4},
        "wide": {"rank": 48},
    }
    return [
        write_peft_adapter(folder / name, shape=runner.shape, dtype="bfloat16", seed=seed, **kind)
        for seed, (name, kind) in enumerate(kinds.items())
    ]


def streams_of(stream_type: Any) -> list[Any]:
    """Return streams with odd prompt lengths and scattered blocks."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randperm(5 * len(LENGTHS), generator=generator).view(len(LENGTHS), 5).tolist()
    return [
        stream_type(name, torch.randint(3, 320, (length,), generator=generator).tolist(), table, SLOTS[name], GREEDY)
        for (name, length), table in zip(LENGTHS.items(), blocks, strict=True)
    ]


def drive(runner: CudaRunner, streams: list[Any], chunks: tuple[int, ...]) -> None:
    """Run all streams to TOKENS tokens each; submit every step before the result of the preceding one."""
    by_name = {stream.name: stream for stream in streams}
    chunk_of = dict(zip(by_name, chunks, strict=True))
    waiting: list[Any] = []
    step_id = 0
    while waiting or any(len(stream.output) < TOKENS for stream in streams):
        unfinished = [stream for stream in streams if len(stream.output) + stream.ahead < TOKENS]
        if unfinished:
            sequences = tuple(stream.next_ahead(chunk_of[stream.name]) for stream in unfinished)
            waiting.append(runner.submit(StepBatch(step_id=step_id, sequences=sequences)))
            step_id += 1
        if len(waiting) == 2 or not unfinished:
            for drawn in waiting.pop(0).result().sampled:
                by_name[drawn.request_id].known.append(drawn.token)
                by_name[drawn.request_id].ahead -= 1


@pytest.fixture
def ahead_stream(helpers: Any) -> Any:
    """Return a Stream class whose newest token may be pending."""

    class Ahead(helpers.Stream):  # type: ignore[misc,name-defined]
        ahead = 0

        def next_ahead(self, chunk: int) -> Any:
            if self.ahead:
                self.known.append(PENDING_TOKEN)
                step = self.next(1)
                self.known.pop()
            else:
                step = self.next(chunk)
            self.computed += len(step.tokens)
            self.ahead += step.sample
            return step

    return Ahead


@pytest.mark.parametrize("family", FAMILIES)
def test_base_and_four_adapters_in_one_batch_equal_transformers_and_peft(
    family: str,
    helpers: Any,
    ahead_stream: Any,
    model_dirs: dict[str, Path],
    tmp_path: Path,
    measured: Callable[[str], None],
) -> None:
    runner = make_cuda_runner(model_dirs[family])
    adapters = four_adapters(runner, tmp_path)
    helpers.install(runner, adapters)
    streams = streams_of(ahead_stream)

    drive(runner, streams, chunks=(8, 25, 16, 20, 3, 17))

    outputs = {}
    for stream in streams:
        adapter = None if stream.slot < 0 else adapters[stream.slot]
        expected = helpers.reference_logits(model_dirs[family], adapter, stream.known, TOKENS)
        assert stream.output == expected.argmax(-1).tolist(), stream.name
        outputs[stream.name] = tuple(stream.output)
    assert len(set(outputs.values())) == len(outputs), "the adapters must change the output"
    measured(f"CUDA runner on {DEVICE.type}, {family}: {len(streams) * TOKENS} greedy tokens equal transformers + peft")
