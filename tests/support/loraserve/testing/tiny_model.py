"""Writes tiny random models and adapters as Hugging Face and PEFT directories."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np

from loraserve.adapter.format import Dtype
from loraserve.model_shape import ModelShape, read_model_config, shape_from_config
from loraserve.testing.peft_writer import PROJECTIONS, named_tensors, random_pairs, tensor_name, write_peft

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}


def write_tiny_model(directory: Path, family: str, seed: int = 0, dtype: Dtype = "float32", **sizes: Any) -> ModelShape:
    """Write a random model of ``family`` whose greedy tokens vary, and return its shape.

    ``sizes`` are further fields of its config.json. Biases and norms are random too, so that an implementation that
    omits one gives wrong tokens.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**SIZES, "eos_token_id": 2, "bos_token_id": 1, **sizes})
    make_model: Any = AutoModelForCausalLM.from_config
    model = make_model(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            parameter.data = 1.0 + 0.3 * noise
        elif parameter.ndim == 1:
            parameter.data = 0.5 * noise
        elif name.endswith("embed_tokens.weight") and not config.tie_word_embeddings:
            parameter.data = noise
        else:
            parameter.data = noise * parameter.shape[1] ** -0.5
    model.tie_weights()
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    return shape_from_config(read_model_config(directory))


class PeftOptions(TypedDict, total=False):
    """Options of ``write_peft_adapter``. By default the adapter has one rank on all projections."""

    targets: Sequence[str]
    rank_pattern: Mapping[str, int]
    """Ranks of the projections whose names match a key, by PEFT's rules."""
    alpha: float
    rslora: bool
    strength: float
    """The change of a projection's output relative to that output, for alpha = rank. The default is 1."""
    dtype: Dtype


def write_peft_adapter(
    directory: Path, shape: ModelShape, rank: int, seed: int = 0, **options: Unpack[PeftOptions]
) -> Path:
    """Write a random adapter and return its directory."""
    targets, pattern = options.get("targets", PROJECTIONS), dict(options.get("rank_pattern", {}))
    strength = options.get("strength", 1.0)
    ranks = {(layer, p): _rank(layer, p, rank, pattern) for layer in range(shape.layers) for p in targets}
    pairs = random_pairs(shape, ranks, seed)
    for key, (a, b) in pairs.items():
        factors = np.float32(a.shape[1] ** -0.5), np.float32(strength * a.shape[0] ** -0.5)
        pairs[key] = (a * factors[0], b * factors[1])
    return write_peft(
        directory,
        named_tensors(pairs),
        options.get("dtype", "float32"),
        r=rank,
        lora_alpha=options.get("alpha", 16),
        use_rslora=options.get("rslora", False),
        target_modules=list(targets),
        rank_pattern=pattern,
        task_type="CAUSAL_LM",
    )


def _rank(layer: int, projection: str, rank: int, pattern: Mapping[str, int]) -> int:
    name = tensor_name(layer, projection, "A", "model.").removesuffix(".lora_A.weight")
    for key, other in pattern.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return other
    return rank
