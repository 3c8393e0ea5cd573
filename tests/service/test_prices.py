"""The cost models of router and planner: the configured profile at start, and what reports add to it."""

from pathlib import Path
from typing import Any

import pytest

from loraserve.bus.protocol import Envelope
from loraserve.config import ClusterConfig, Config, ModelConfig
from loraserve.cost import CostModel, StepShape, mean_step
from loraserve.cost.profile import read_profile
from loraserve.errors import ConfigError
from loraserve.messages import ToPlanner, ToRouter
from loraserve.planner.service import PlannerService
from loraserve.router.service import RouterService
from loraserve.testing.clock import LoopClock, run_virtual
from loraserve.testing.memory_bus import MemoryNetwork
from loraserve.testing.reports import engine_seen, picture
from loraserve.testing.tiny_model import write_tiny_model

KINDS = [("router", RouterService, ToRouter), ("planner", PlannerService, ToPlanner)]


def cost_of(name: str, kind: Any, inbox: Any, profile: str, data_dir: Path, model: str = "") -> CostModel:
    config = Config(
        cluster=ClusterConfig(profile=profile, data_dir=str(data_dir)),
        model=ModelConfig(path=model),
    )

    async def begin() -> CostModel:
        service = kind(config, MemoryNetwork().bus(name, inbox), LoopClock())
        cost: CostModel = service._learner.cost
        return cost

    return run_virtual(begin())


@pytest.mark.parametrize(("name", "kind", "inbox"), KINDS)
def test_the_first_cost_model_is_the_configured_profile(name: str, kind: Any, inbox: Any, tmp_path: Path) -> None:
    named = read_profile("llama-3-8b-a100").cost
    assert cost_of(name, kind, inbox, "llama-3-8b-a100", tmp_path) == named
    assert cost_of(name, kind, inbox, "", tmp_path) == CostModel()


@pytest.mark.parametrize(("name", "kind", "inbox"), KINDS)
def test_a_profile_for_another_model_prevents_the_start(name: str, kind: Any, inbox: Any, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "tiny", "llama")
    with pytest.raises(ConfigError, match=r"llama-3-8b-a100 is for another model.*scripts/profile"):
        cost_of(name, kind, inbox, "llama-3-8b-a100", tmp_path, str(tmp_path / "tiny"))


@pytest.mark.parametrize(("name", "kind", "inbox"), KINDS)
def test_repeated_measurements_of_an_idle_engine_count_once(name: str, kind: Any, inbox: Any, tmp_path: Path) -> None:
    slow = mean_step(StepShape(prefill_tokens=32), 3.0)
    config = Config(cluster=ClusterConfig(data_dir=str(tmp_path)))

    async def learned(*prefill_steps: int) -> CostModel:
        service = kind(config, MemoryNetwork().bus(name, inbox), LoopClock())
        for sequence, steps in enumerate(prefill_steps, 1):
            load = engine_seen(prefill_step=slow, prefill_steps=steps)
            await service.handle(Envelope("monitor", picture(load, sequence=sequence)))
        cost: CostModel = service._learner.cost
        return cost

    async def scenario() -> None:
        once = await learned(1)
        assert once.prefill_token_s > CostModel().prefill_token_s
        assert await learned(1, 1, 1) == once
        assert (await learned(1, 2)).prefill_token_s > once.prefill_token_s

    run_virtual(scenario())
