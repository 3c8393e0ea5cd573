"""The dimensions of a base model, for adapter layouts, memory planning and validation.

This module reads them from a Hugging Face ``config.json`` of the Llama, Mistral, Qwen2 or Qwen3 family. It does not
import torch, because the store and the planner use it.
"""

import json
from pathlib import Path

import msgspec

from loraserve.errors import ConfigError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

MODULES = ("qkv", "o", "gate_up", "down")
"""The fused modules of a layer, in the order of execution and of storage in a slab."""

QKV, OUT, GATE_UP, DOWN = range(len(MODULES))
"""Indices into MODULES."""

SLICES: dict[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
"""Maps each module to its projections (Hugging Face names) in the order of the fused output."""


class ModelShape(msgspec.Struct, frozen=True):
    """The dimensions of a model. Widths are in elements."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int

    def in_features(self, module: str) -> int:
        """Return the input width of a fused module (K in the kernels)."""
        return {"o": self.heads * self.head_dim, "down": self.ffn}.get(module, self.hidden)

    def out_features(self, module: str) -> tuple[int, ...]:
        """Return the output widths of a fused module's projections, in the order of ``SLICES``."""
        kv = self.kv_heads * self.head_dim
        if module == "qkv":
            return (self.heads * self.head_dim, kv, kv)
        if module == "gate_up":
            return (self.ffn, self.ffn)
        return (self.hidden,)


def shape_from_config(config: dict[str, object]) -> ModelShape:
    """Return the model shape that a parsed ``config.json`` describes.

    Raises ConfigError if the model family is not supported, or a field is missing or not a positive integer.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(
            f"model_type {family!r} is not supported; use a model of one of the families {', '.join(FAMILIES)}"
        )

    def size(name: str, default: int | None = None) -> int:
        value = config.get(name)
        if value is None:
            value = default
        if not isinstance(value, int) or value <= 0:
            raise ConfigError(f"config.json: {name} must be a positive integer, found {value!r}")
        return value

    heads = size("num_attention_heads")
    hidden = size("hidden_size")
    return ModelShape(
        layers=size("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", hidden // heads),
        ffn=size("intermediate_size"),
        vocab=size("vocab_size"),
    )


def read_model_config(model_dir: Path) -> dict[str, object]:
    """Return the parsed ``config.json`` of a model directory. Raises ConfigError if it cannot be read."""
    path = model_dir / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: {error}; --model must name a Hugging Face model directory holding config.json"
        ) from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: expected a JSON object")
    return config
