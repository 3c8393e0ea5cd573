"""Writes PEFT directories with random weights, without torch or peft."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraserve.adapter.dtypes import from_float32
from loraserve.adapter.format import Dtype
from loraserve.adapter.peft import CONFIG_FILE, WEIGHTS_FILE
from loraserve.model_shape import SLICES, ModelShape

Pairs = dict[tuple[int, str], tuple[NDArray[np.float32], NDArray[np.float32]]]
"""A ``[rank, in]`` and B ``[out, rank]`` by (layer, projection)."""

TINY_SHAPE = ModelShape(layers=2, hidden=16, heads=4, kv_heads=2, head_dim=4, ffn=24, vocab=64)
PROJECTIONS = tuple(name for names in SLICES.values() for name in names)
_SAFETENSORS_DTYPES: dict[Dtype, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def random_pairs(
    shape: ModelShape, ranks: Mapping[tuple[int, str], int] | int, seed: int = 0, projections: Iterable[str] = ()
) -> Pairs:
    """Return normally distributed A and B for each (layer, projection).

    ``ranks`` has the rank of each, or is one rank for all ``projections`` (default: all).
    """
    rng = np.random.default_rng(seed)
    if isinstance(ranks, int):
        rank = ranks
        ranks = {(layer, name): rank for layer in range(shape.layers) for name in projections or PROJECTIONS}
    pairs: Pairs = {}
    for (layer, name), rank in ranks.items():
        module = next(module for module, names in SLICES.items() if name in names)
        out = shape.out_features(module)[SLICES[module].index(name)]
        a = rng.standard_normal((rank, shape.in_features(module)), dtype=np.float32)
        pairs[layer, name] = (a, rng.standard_normal((out, rank), dtype=np.float32))
    return pairs


def tensor_name(layer: int, projection: str, matrix: str, prefix: str = "base_model.model.model.") -> str:
    """Return PEFT's name of one matrix, ``A`` or ``B``."""
    block = "self_attn" if projection in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    return f"{prefix}layers.{layer}.{block}.{projection}.lora_{matrix}.weight"


def named_tensors(pairs: Pairs) -> dict[str, NDArray[np.float32]]:
    """Return the matrices by PEFT's names."""
    named = {}
    for (layer, projection), (a, b) in pairs.items():
        named[tensor_name(layer, projection, "A")] = a
        named[tensor_name(layer, projection, "B")] = b
    return named


def write_peft(
    directory: Path, tensors: Mapping[str, NDArray[np.float32]], dtype: Dtype = "float32", **config: Any
) -> Path:
    """Write a PEFT directory; ``config`` overrides fields of its configuration (r 8, lora_alpha 16 by default)."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none", "target_modules": ["q_proj"], **config}
    (directory / CONFIG_FILE).write_text(json.dumps(settings))
    (directory / WEIGHTS_FILE).write_bytes(safetensors_bytes(tensors, dtype))
    return directory


def safetensors_bytes(tensors: Mapping[str, NDArray[np.float32]], dtype: Dtype = "float32") -> bytes:
    """Return the bytes of a safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blocks = []
    position = 0
    for name, values in tensors.items():
        block = from_float32(values, dtype).tobytes()
        offsets = [position, position + len(block)]
        header[name] = {"dtype": _SAFETENSORS_DTYPES[dtype], "shape": list(values.shape), "data_offsets": offsets}
        position += len(block)
        blocks.append(block)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(blocks)
