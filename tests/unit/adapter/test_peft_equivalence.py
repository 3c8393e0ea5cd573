"""The delta weights that peft computes for a saved adapter equal scale * B A of the unpacked slab."""

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import assume, given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from loraserve.adapter.pack import pack_peft
from loraserve.adapter.peft import PeftConfig, Scaling
from loraserve.errors import AdapterError
from loraserve.model_shape import ModelShape, shape_from_config
from loraserve.testing.slabs import unpack_slab

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _base() -> tuple[transformers.LlamaForCausalLM, ModelShape]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=12, intermediate_size=40, vocab_size=64,
        num_hidden_layers=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), shape_from_config(config.to_dict())


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 8, "lora_alpha": 16, "target_modules": ALL},
        {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
        {"r": 6, "lora_alpha": 12, "target_modules": ALL, "layers_to_transform": [1]},
        {
            "r": 8, "lora_alpha": 16, "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 5, "mlp.down_proj": 3},
            "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 7, "up_proj": 32},
        },
        {
            "r": 8, "lora_alpha": 16, "target_modules": r".*\.(k|o)_proj", "use_rslora": True,
            "rank_pattern": {"model.layers.0.self_attn.k_proj": 1}, "init_lora_weights": "gaussian",
        },
    ],
    ids=["plain", "rslora", "one-layer", "patterns", "rslora-pattern"],
)  # fmt: skip
def test_delta_weights_equal_those_of_peft(tmp_path: Path, settings: dict[str, object]) -> None:
    base, shape = _base()
    model = peft.get_peft_model(base, peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path)
    slab = pack_peft(tmp_path, shape, "float32", max_rank=8)
    unpacked = unpack_slab(slab.header, slab.data)
    expected = _deltas(model)
    assert unpacked.keys() == expected.keys()
    for place, (a, b, scale) in unpacked.items():
        np.testing.assert_allclose(scale * (b @ a), expected[place], rtol=1e-4, atol=1e-4)


def _deltas(model: peft.PeftModel) -> dict[tuple[int, str], np.ndarray]:
    deltas = {}
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.Linear):
            parts = name.split(".")
            place = int(parts[parts.index("layers") + 1]), parts[-1]
            deltas[place] = module.get_delta_weight("default").detach().numpy()
    return deltas


MODULE_NAMES = [f"model.layers.{i}.{block}" for i in (0, 1, 11) for block in ("self_attn.q_proj", "mlp.down_proj")]
PIECES = ["q_proj", "_proj", "proj", "down", "mlp", "self_attn", ".", r"\.", ".*", "layers", r"\d+", "1", "11", "^",
          "model", "$", "(q|down)", "[a-z_]+", "?", "|"]  # fmt: skip


@given(st.lists(st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join), max_size=4, unique=True))
def test_patterns_match_as_in_peft(keys: list[str]) -> None:
    pattern = {key: index for index, key in enumerate(keys)}
    config = PeftConfig(r=-1, lora_alpha=1, rank_pattern=pattern)
    try:
        scaling = Scaling(config)
    except AdapterError:
        assume(False)
    for name in MODULE_NAMES:
        assert scaling.rank(name) == pattern.get(get_pattern_key(pattern.keys(), name), -1)
