"""Reads the model's config.json and rejects models that the decoder cannot compute exactly."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from loraserve.eos_tokens import eos_token_ids
from loraserve.errors import ConfigError
from loraserve.model_shape import ModelShape, read_model_config, shape_from_config

ROPE_TYPES = ("default", "linear", "llama3")


class Rope(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary embedding. Types linear and llama3 use ``factor``. Only llama3 uses the last three fields."""

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 0


class DecoderConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A decoder's configuration. ``sliding_window`` is None if every layer attends to the whole context."""

    shape: ModelShape
    rms_eps: float
    rope: Rope
    max_positions: int
    sliding_window: int | None
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool
    eos_token_ids: tuple[int, ...]


def read_decoder_config(model_dir: Path) -> DecoderConfig:
    """Read config.json. Raises ConfigError, which names the missing, wrong or unsupported field."""
    config = read_model_config(model_dir)
    shape = shape_from_config(config)
    family = str(config["model_type"])
    _check_supported(config)
    if shape.heads % shape.kv_heads:
        raise ConfigError(f"config.json: num_attention_heads {shape.heads} is no multiple of {shape.kv_heads} KV heads")
    if shape.head_dim % 2:
        raise ConfigError(f"config.json: head_dim {shape.head_dim} is odd; rotary embeddings need an even one")
    attention_bias = bool(config.get("attention_bias", False))
    positions = _positive_number(config, "max_position_embeddings", None)
    return DecoderConfig(
        shape=shape,
        rms_eps=_positive_number(config, "rms_norm_eps", 1e-6),
        rope=_rope(config, int(positions)),
        max_positions=int(positions),
        sliding_window=_sliding_window(config, family),
        qkv_bias=family == "qwen2" or (family != "mistral" and attention_bias),
        o_bias=family in ("llama", "qwen3") and attention_bias,
        mlp_bias=family == "llama" and bool(config.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        tied=bool(config.get("tie_word_embeddings", False)),
        eos_token_ids=eos_token_ids(model_dir, config),
    )


def context_limit(config: DecoderConfig, progress: Callable[[str], None]) -> int:
    """Return the longest context, in tokens, that the decoder computes exactly."""
    window = config.sliding_window
    if window is None or window >= config.max_positions:
        return config.max_positions
    # In contexts up to the window's length, windowed and full attention are equal.
    progress(f"context limited to {window} tokens: longer ones need sliding-window attention, which is not supported")
    return window


def _check_supported(config: Mapping[str, Any]) -> None:
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ConfigError(f"config.json: hidden_act {activation!r} is not supported; only models with silu are")
    if config.get("quantization_config"):
        raise ConfigError(
            "config.json: quantization_config: quantised weights are not supported; use the model's "
            "bfloat16, float16 or float32 weights"
        )


def _positive_number(config: Mapping[str, Any], name: str, default: float | None) -> float:
    value = config.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ConfigError(f"config.json: {name} must be a positive number, found {value!r}")
    return value


def _rope(config: Mapping[str, Any], max_positions: int) -> Rope:
    """Read the fields ``rope_theta`` and ``rope_scaling``, or the newer field ``rope_parameters``."""
    newer = config.get("rope_parameters")
    field = "rope_parameters" if newer else "rope_scaling"
    values = config.get(field) or {}
    if not isinstance(values, Mapping) or any(isinstance(value, Mapping) for value in values.values()):
        raise ConfigError(f"config.json: {field} must be one object for all layers, found {values!r}")
    kind = values.get("rope_type") or values.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise ConfigError(f"config.json: {field} of type {kind!r} is not supported; of {', '.join(ROPE_TYPES)} are")
    if _positive_number({**config, **values}, "partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"config.json: {field}: partial_rotary_factor other than 1 is not supported")

    def number(name: str, default: float | None) -> float:
        return _positive_number(values, name, default) if kind != "default" else default or 1.0

    return Rope(
        theta=_positive_number(values if "rope_theta" in values else config, "rope_theta", 10000.0),
        type=kind,
        factor=number("factor", None),
        low_freq_factor=number("low_freq_factor", None if kind == "llama3" else 1.0),
        high_freq_factor=number("high_freq_factor", None if kind == "llama3" else 4.0),
        original_positions=int(number("original_max_position_embeddings", max_positions)),
    )


def _sliding_window(config: Mapping[str, Any], family: str) -> int | None:
    """Return the sliding window in tokens; None if there is none. Defaults are those of transformers."""
    if family == "mistral":
        window = config.get("sliding_window", 4096)
    elif family in ("qwen2", "qwen3") and config.get("use_sliding_window", False):
        layer_types = config.get("layer_types")
        layers = config["num_hidden_layers"]
        some = "sliding_attention" in layer_types if layer_types else config.get("max_window_layers", 28) < layers
        window = config.get("sliding_window", 4096) if some else None
    else:
        window = None
    return None if window is None else int(_positive_number({"sliding_window": window}, "sliding_window", None))
