import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraserve.engine.model.config import read_decoder_config
from loraserve.engine.model.linear import CpuWeightForm
from loraserve.engine.model.weights import DecoderWeights, load_weights
from loraserve.errors import ConfigError
from loraserve.testing.tiny_model import write_tiny_model

Tensors = dict[str, torch.Tensor]


def load(model_dir: Path, progress: Callable[[str], None] = lambda text: None) -> DecoderWeights:
    return load_weights(model_dir, read_decoder_config(model_dir), CpuWeightForm("float32"), progress)


def copy_with_change(source: Path, target: Path, change: Callable[[Tensors], None]) -> Path:
    """Return a copy of a model directory whose tensors ``change`` has modified."""
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    (target / "config.json").write_text((source / "config.json").read_text())
    save_file(tensors, target / "model.safetensors")
    return target


def test_projections_are_stacked_in_the_order_of_a_slab(model_dirs: dict[str, Path]) -> None:
    tensors = load_file(model_dirs["qwen2"] / "model.safetensors")
    layer = load(model_dirs["qwen2"]).layers[1]
    prefix = "model.layers.1.self_attn."
    x = torch.randn(3, 64)
    expected = [
        torch.nn.functional.linear(x, tensors[f"{prefix}{p}_proj.weight"], tensors[f"{prefix}{p}_proj.bias"])
        for p in "qkv"
    ]
    torch.testing.assert_close(layer.qkv(x), torch.cat(expected, 1))


def test_progress_is_reported_for_each_layer(model_dirs: dict[str, Path]) -> None:
    told: list[str] = []
    load(model_dirs["llama"], told.append)
    assert told == [f"loading weights: layer {n} of 3" for n in (1, 2, 3)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_widened(model_dirs: dict[str, Path], tmp_path: Path, dtype: torch.dtype) -> None:
    def narrow(tensors: Tensors) -> None:
        for name in tensors:
            tensors[name] = tensors[name].to(dtype)

    weights = load(copy_with_change(model_dirs["qwen3"], tmp_path, narrow))
    tensors = load_file(tmp_path / "model.safetensors")
    assert torch.equal(weights.norm, tensors["model.norm.weight"].float())
    assert torch.equal(weights.embedding, tensors["model.embed_tokens.weight"])
    x = torch.randn(2, 64)
    torch.testing.assert_close(weights.head(x), x @ tensors["lm_head.weight"].float().T)


def test_sharded_checkpoint_loads_the_same(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(model_dirs["llama"] / "model.safetensors")
    (tmp_path / "config.json").write_text((model_dirs["llama"] / "config.json").read_text())
    names = sorted(tensors)
    files = {name: f"model-{index % 3}.safetensors" for index, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    x = torch.randn(2, 64)
    assert torch.equal(load(tmp_path).layers[2].gate_up(x), load(model_dirs["llama"]).layers[2].gate_up(x))


def test_a_tied_head_is_the_embedding_whether_or_not_it_is_stored(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    def store_head(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = torch.zeros(320, 64)

    x = torch.randn(2, 64)
    tied = load(copy_with_change(model_dirs["qwen2"], tmp_path, store_head))
    assert torch.equal(tied.head(x), load(model_dirs["qwen2"]).head(x))
    assert tied.head(x).abs().max() > 0


def drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def replace(name: str, tensor: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("model.layers.1.mlp.up_proj.weight"), r"model\.layers\.1\.mlp\.up_proj\.weight is missing"),
        (drop("model.layers.2.self_attn.k_proj.bias"), r"self_attn\.k_proj\.bias is missing"),
        (drop("lm_head.weight"), r"lm_head\.weight is missing"),
        (
            replace("model.norm.weight", torch.ones(32)),
            r"model\.norm\.weight has shape \[32\], config\.json asks for \[64\]",
        ),
        (replace("model.norm.weight", torch.ones(64, dtype=torch.float64)), "use float32, bfloat16 or float16"),
        (replace("model.layers.0.self_attn.q_norm.weight", torch.ones(16)), r"no place.*self_attn\.q_norm\.weight"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_in_the_error(
    model_dirs: dict[str, Path], tmp_path: Path, change: Callable[[Tensors], None], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(copy_with_change(model_dirs["llama"], tmp_path, change))


def test_old_rotary_buffers_are_ignored(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    load(copy_with_change(model_dirs["llama"], tmp_path, replace(name, torch.ones(8))))


def test_missing_and_broken_files_are_named_in_the_error(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((model_dirs["llama"] / "config.json").read_text())
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ConfigError, match=r"model\.safetensors: .*fetch them again"):
        load(tmp_path)
    for index in ("[]", '{"weight_map": {"a": "../b"}}', '{"weight_map": {"a": "absent.safetensors"}}'):
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(ConfigError, match="fetch them again"):
            load(tmp_path)


def test_weights_do_not_change_with_the_file(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "llama")
    weights = load(tmp_path)
    x = torch.randn(1, 64)
    before = weights.head(x), weights.embedding.clone(), weights.layers[0].o(x)
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(len(file.read_bytes())))
    after = weights.head(x), weights.embedding, weights.layers[0].o(x)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
