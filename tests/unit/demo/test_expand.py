"""An expanded adapter has a larger rank and the same output."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraserve.demo.weights import expand_rank
from loraserve.errors import AdapterError

PREFIX = "base_model.model.model.layers.{layer}.self_attn.{name}.lora_{matrix}.weight"
SHAPES = {"q_proj": (40, 24), "v_proj": (16, 24)}
SEED = 11


def write_adapter(folder: Path, rank: int, **fields: Any) -> None:
    """Write a two-layer PEFT adapter with random weights in bf16."""
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for layer in range(2):
        for name, (out_features, in_features) in SHAPES.items():
            for matrix, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
                key = PREFIX.format(layer=layer, name=name, matrix=matrix)
                weights[key] = torch.randn(shape, generator=generator).to(torch.bfloat16)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 32, "target_modules": sorted(SHAPES), **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def read_config(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return content


def updates(folder: Path) -> dict[str, torch.Tensor]:
    """Return what each projection adds to the base weight: B @ A * scale."""
    config, weights = read_config(folder), load_file(folder / "adapter_model.safetensors")
    divisor = config["r"] ** 0.5 if config.get("use_rslora") else config["r"]
    return {
        name: weights[name.replace("lora_A", "lora_B")].float() @ a.float() * (config["lora_alpha"] / divisor)
        for name, a in weights.items()
        if "lora_A" in name
    }


def folders(tmp_path: Path) -> tuple[Path, Path]:
    small, large = tmp_path / "small", tmp_path / "large"
    small.mkdir()
    large.mkdir()
    return small, large


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("rank", "expanded"), [(8, 64), (3, 10), (8, 8)])
def test_an_expanded_adapter_computes_the_same(tmp_path: Path, rank: int, expanded: int, rslora: bool) -> None:
    small, large = folders(tmp_path)
    write_adapter(small, rank, use_rslora=rslora)
    expand_rank(small, large, expanded, SEED)
    before, after = updates(small), updates(large)
    assert before.keys() == after.keys()
    for name, update in before.items():
        assert float(update.abs().max()) > 1
        relative = (after[name] - update).abs().max() / update.abs().max()
        assert float(relative) < 1e-5


def test_the_new_rank_is_real_and_dense(tmp_path: Path) -> None:
    small, large = folders(tmp_path)
    write_adapter(small, 8)
    expand_rank(small, large, 64, SEED)
    assert read_config(large)["r"] == 64
    for name, tensor in load_file(large / "adapter_model.safetensors").items():
        rank_axis = 1 if "lora_B" in name else 0
        assert tensor.shape[rank_axis] == 64
        # every unit of rank must carry weight, or a server could serve this as rank 8
        assert float(tensor.abs().amax(dim=1 - rank_axis).min()) > 0
        assert float((tensor == 0).float().mean()) < 0.01


def test_equal_seeds_give_equal_files(tmp_path: Path) -> None:
    small, large = folders(tmp_path)
    write_adapter(small, 4)

    def content(seed: int) -> bytes:
        expand_rank(small, large, 16, seed)
        return (large / "adapter_model.safetensors").read_bytes()

    first = content(1)
    assert content(1) == first
    assert content(2) != first


@pytest.mark.parametrize(
    ("fields", "rank", "code", "named"),
    [
        ({"rank_pattern": {"q_proj": 2}}, 16, "unsupported", "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, 16, "unsupported", "alpha_pattern"),
        ({"use_dora": True}, 16, "unsupported", "use_dora"),
        ({}, 4, "bad_rank", "rank 4"),
    ],
)
def test_unsupported_adapters_are_not_expanded(
    tmp_path: Path, fields: dict[str, Any], rank: int, code: str, named: str
) -> None:
    small, large = folders(tmp_path)
    write_adapter(small, 8, **fields)
    with pytest.raises(AdapterError, match=named) as refusal:
        expand_rank(small, large, rank, SEED)
    assert refusal.value.code == code
    assert list(large.iterdir()) == []


def test_an_adapter_with_more_than_a_and_b_is_refused(tmp_path: Path) -> None:
    small, large = folders(tmp_path)
    write_adapter(small, 8)
    weights = load_file(small / "adapter_model.safetensors")
    weights["base_model.model.lm_head.weight"] = torch.ones(2, 2)
    save_file(weights, small / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="lm_head"):
        expand_rank(small, large, 16, SEED)
