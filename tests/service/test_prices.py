"""Router and planner begin to price with the profile that the configuration names."""

from pathlib import Path
from typing import Any

import pytest

from loraserve.config import ClusterConfig, Config, ModelConfig
from loraserve.cost import CostModel
from loraserve.cost.profile import read_profile
from loraserve.errors import ConfigError
from loraserve.messages import ToPlanner, ToRouter
from loraserve.planner.service import PlannerService
from loraserve.router.service import RouterService
from loraserve.testing.bus import MemoryNetwork
from loraserve.testing.clock import LoopClock, run_virtual
from loraserve.testing.tiny_model import write_tiny_model

KINDS = [("router", RouterService, ToRouter), ("planner", PlannerService, ToPlanner)]


def cost_of(name: str, kind: Any, inbox: Any, profile: str, data_dir: Path, model: str = "") -> CostModel:
    config = Config(
        cluster=ClusterConfig(profile=profile, data_dir=str(data_dir)),
        model=ModelConfig(path=model),
    )

    async def begin() -> CostModel:
        service = kind(config, MemoryNetwork().bus(name, inbox), LoopClock())
        cost: CostModel = service._cost
        return cost

    return run_virtual(begin())


@pytest.mark.parametrize(("name", "kind", "inbox"), KINDS)
def test_pricing_begins_with_the_profile_that_is_named(name: str, kind: Any, inbox: Any, tmp_path: Path) -> None:
    named = read_profile("llama-3-8b-a100").cost
    assert cost_of(name, kind, inbox, "llama-3-8b-a100", tmp_path) == named
    assert cost_of(name, kind, inbox, "", tmp_path) == CostModel()


@pytest.mark.parametrize(("name", "kind", "inbox"), KINDS)
def test_a_profile_for_another_model_starts_neither(name: str, kind: Any, inbox: Any, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "tiny", "llama")
    with pytest.raises(ConfigError, match=r"llama-3-8b-a100 is for another model.*scripts/profile"):
        cost_of(name, kind, inbox, "llama-3-8b-a100", tmp_path, str(tmp_path / "tiny"))
