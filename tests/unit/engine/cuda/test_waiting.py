"""Launching a step never makes the host wait for the device; only reading the result does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loraserve.adapter.pack import pack_peft
from loraserve.config import EngineConfig
from loraserve.engine.schedule.events import PENDING_TOKEN, SequenceStep, StepBatch
from loraserve.messages.sampling import SamplingParams
from loraserve.testing.tiny_model import write_peft_adapter

pytest.importorskip("triton", reason="the CUDA runner needs triton")

from loraserve.engine.cuda.runner import load_cuda_runner

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "repeat_interleave")


class NothingWaits(TorchDispatchMode):
    """Counts calls, and fails on calls that need a value from the device."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        indices = args[1] if name.startswith("index") and isinstance(args[1], list | tuple) else ()
        assert not any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in indices), f"{name} by a mask"
        assert not name.startswith(WAITING), name
        self.calls += 1
        return func(*args, **(kwargs or {}))


def sequence(name: str, tokens: tuple[int, ...], start: int, slot: int) -> SequenceStep:
    sampling = SamplingParams(max_tokens=9, temperature=0.8, top_p=0.9, logprobs=2, seed=3)
    return SequenceStep(
        request_id=name, tokens=tokens, start=start, blocks=(int(name),), sampling=sampling, prompt_length=3, slot=slot
    )


def test_a_step_is_launched_without_waiting(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    engine = EngineConfig(
        slab_dtype="float32", max_running=4, max_adapters=2, max_step_tokens=16, max_rank=8, kv_bytes=1 << 20,
        pool_bytes=1 << 20, memory_fraction=0.1,
    )  # fmt: skip
    runner = load_cuda_runner(model_dirs["llama"], engine, DEVICE, lambda text: None)
    slab = pack_peft(write_peft_adapter(tmp_path / "a", shape=runner.shape, rank=4), runner.shape, "float32", 8)
    runner.pool.write(0, slab.data)
    prefill = StepBatch(step_id=0, sequences=(sequence("0", (5, 6, 7), 0, 0), sequence("1", (8, 9), 0, -1)))
    decode = StepBatch(
        step_id=1, sequences=(sequence("0", (PENDING_TOKEN,), 3, 0), sequence("1", (PENDING_TOKEN,), 2, -1))
    )
    runner.step(prefill)
    with NothingWaits() as watch:
        runner.install(0, slab.header, 0)
        steps = [runner.submit(prefill), runner.submit(decode)]
    assert watch.calls > 50
    assert [len(step.result().sampled) for step in steps] == [2, 2]


def test_a_wait_is_detected() -> None:
    with NothingWaits(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        torch.ones(1).item()
