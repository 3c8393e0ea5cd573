import json
from pathlib import Path
from typing import Any

import pytest

from loraserve.engine.model.config import Rope, read_decoder_config
from loraserve.errors import ConfigError

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 100,
    "max_position_embeddings": 256,
    "eos_token_id": 7,
}


def write(directory: Path, **fields: Any) -> Path:
    config = {key: value for key, value in {**LLAMA, **fields}.items() if value != "absent"}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    config = read_decoder_config(write(tmp_path))
    assert (config.rms_eps, config.rope, config.tied) == (1e-6, Rope(original_positions=256), False)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm) == (False, False, False, False)


@pytest.mark.parametrize(
    ("fields", "biases"),
    [
        ({"attention_bias": True}, (True, True, False)),
        ({"mlp_bias": True}, (False, False, True)),
        ({"model_type": "qwen2"}, (True, False, False)),
        ({"model_type": "qwen3", "attention_bias": True}, (True, True, False)),
        ({"model_type": "mistral", "attention_bias": True}, (False, False, False)),
    ],
)
def test_biases_by_family(tmp_path: Path, fields: dict[str, Any], biases: tuple[bool, ...]) -> None:
    config = read_decoder_config(write(tmp_path, **fields))
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == biases


def test_only_qwen3_norms_each_head(tmp_path: Path) -> None:
    assert read_decoder_config(write(tmp_path, model_type="qwen3")).qk_norm


def test_rope_theta_in_both_spellings(tmp_path: Path) -> None:
    older = read_decoder_config(write(tmp_path, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0}))
    newer = read_decoder_config(
        write(tmp_path, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5})
    )
    assert older.rope == newer.rope == Rope(theta=5e5, type="linear", factor=2.0, original_positions=256)


def test_llama3_rope(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    rope = read_decoder_config(write(tmp_path, rope_scaling=scaling)).rope
    assert rope == Rope(type="llama3", factor=8.0, original_positions=64)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn' is not supported; of default, linear, llama3"),
        ({"rope_scaling": {"type": "linear"}}, "factor must be a positive number, found None"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters must be one object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"max_position_embeddings": "absent"}, "max_position_embeddings must be a positive number, found None"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a positive number, found '1e-5'"),
        ({"num_key_value_heads": 3}, "no multiple of 3 KV heads"),
        ({"head_dim": 15}, "head_dim 15"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id"),
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
    ],
)
def test_an_unsupported_model_is_refused_with_the_field(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_decoder_config(write(tmp_path, **fields))


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({"model_type": "mistral", "sliding_window": 128}, 128),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral"}, 4096),
        ({"model_type": "qwen2", "sliding_window": 128}, None),
        ({"model_type": "qwen2", "sliding_window": 128, "use_sliding_window": True, "max_window_layers": 1}, 128),
        ({"model_type": "qwen2", "sliding_window": 128, "use_sliding_window": True, "max_window_layers": 2}, None),
        (
            {
                "model_type": "qwen3",
                "sliding_window": 128,
                "use_sliding_window": True,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            128,
        ),
        ({"sliding_window": 128}, None),
    ],
)
def test_sliding_window_of_some_layers_applies(tmp_path: Path, fields: dict[str, Any], window: int | None) -> None:
    assert read_decoder_config(write(tmp_path, **fields)).sliding_window == window


@pytest.mark.parametrize(
    ("generation", "fields", "expected"),
    [
        (None, {}, (7,)),
        ({"eos_token_id": [3, 4]}, {}, (3, 4)),
        ({"eos_token_id": 0}, {}, (0,)),
        ({}, {}, (7,)),
        (None, {"eos_token_id": "absent"}, ()),
    ],
)
def test_eos_ids(
    tmp_path: Path, generation: dict[str, Any] | None, fields: dict[str, Any], expected: tuple[int, ...]
) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert read_decoder_config(write(tmp_path, **fields)).eos_token_ids == expected


def test_a_broken_generation_config_is_named_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        read_decoder_config(write(tmp_path))
