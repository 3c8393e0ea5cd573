"""The engine's process with the CUDA runner, which uses Triton's interpreter if there is no GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loraserve.config import Config

pytest.importorskip("triton", reason="the CUDA runner needs triton")

from loraserve.engine.cuda.runner import CudaRunner, load_cuda_runner

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build(config: Config, progress: Callable[[str], None]) -> CudaRunner:
    return load_cuda_runner(Path(config.model.path), config.engine, DEVICE, progress)


def test_base_and_adapter_requests_get_their_tokens(play: Callable[..., None], models: Any) -> None:
    async def scenario(stage: Any) -> None:
        for name, adapter in (("base", ""), ("adapted", "one")):
            await stage.admit(name, adapter, tokens=3)
        await stage.finished("base", "adapted")
        for name, adapter in (("base", ""), ("adapted", "one")):
            assert stage.tokens[name] == models.expected(adapter, 3)
        assert stage.tokens["base"] != stage.tokens["adapted"]
        assert (await stage.fresh_counters()).leaks == 0

    play(scenario, build=build, max_adapters=2, max_rank=8, max_step_tokens=32, max_running=2, memory_fraction=0.1)
