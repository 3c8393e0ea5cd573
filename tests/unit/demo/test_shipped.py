"""The shipped adapters are small, safe to load and have the ranks that they claim."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from loraserve.demo import demo_adapters
from loraserve.demo.shipped import SHIPPED_DIR

SHIPPED_RANKS = {"pirate": 8, "json": 16, "french": 32, "shout": 8}
LIMIT_BYTES = 8_000_000
LAYERS = 30


def adapter_folders() -> list[Path]:
    return [SHIPPED_DIR / name for name in SHIPPED_RANKS]


def tensor_ranks(folder: Path) -> set[int]:
    """Return the ranks according to the shapes of the weights."""
    weights = load_file(folder / "adapter_model.safetensors")
    return {tensor.shape[1 if "lora_B" in name else 0] for name, tensor in weights.items()}


def test_shipped_adapters_are_small_and_contain_no_pickle() -> None:
    files = [path for path in SHIPPED_DIR.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"adapter_config.json", "adapter_model.safetensors"}
    assert {path.parent.name for path in files} == set(SHIPPED_RANKS)
    assert sum(path.stat().st_size for path in files) <= LIMIT_BYTES


@pytest.mark.parametrize("folder", adapter_folders(), ids=lambda folder: folder.name)
def test_weights_are_bf16_of_q_and_v_at_the_rank_claimed(folder: Path) -> None:
    assert tensor_ranks(folder) == {SHIPPED_RANKS[folder.name]}
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == SHIPPED_RANKS[folder.name]
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as weights:
        names = set(weights.keys())
        assert {weights.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert len(names) == LAYERS * 2 * 2
    assert all("q_proj" in name or "v_proj" in name for name in names)


@pytest.mark.parametrize("folder", adapter_folders(), ids=lambda folder: folder.name)
def test_weights_are_finite_and_trained(folder: Path) -> None:
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        assert tensor.isfinite().all(), name
        # B is zero before the training.
        assert float(tensor.abs().max()) > 0, name


@pytest.mark.parametrize("folder", adapter_folders(), ids=lambda folder: folder.name)
def test_configs_contain_no_local_paths(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "SmolLM2-135M-Instruct"
    texts = [value for value in config.values() if isinstance(value, str)]
    assert not [text for text in texts if "/" in text or "\\" in text]


def test_the_demo_serves_four_ranks(tmp_path: Path) -> None:
    said: list[str] = []
    served = demo_adapters(tmp_path, said.append)
    assert [(adapter.name, adapter.rank) for adapter in served] == [
        ("pirate", 8),
        ("json", 16),
        ("french", 32),
        ("shout", 64),
    ]
    for _, path, rank in served:
        assert tensor_ranks(path) == {rank}
        assert json.loads((path / "adapter_config.json").read_text())["r"] == rank
    assert said == ["expanding the adapter shout to rank 64"]
    assert served[-1].path.is_relative_to(tmp_path)
    assert demo_adapters(tmp_path, said.append) == served
    assert len(said) == 1
