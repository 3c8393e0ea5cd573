"""Writes GGUF files for llama.cpp: the demo model in float32, and PEFT adapters."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize
from numpy.typing import NDArray

from loraserve.adapter.peft import CONFIG_FILE, WEIGHTS_FILE
from loraserve.model_shape import ModelShape

ARCHITECTURE = "llama"
NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
SKIPPED_FIELDS = {"general.architecture", "general.file_type", "general.quantization_version"}
ALL_F32 = 0
"""llama.cpp's file type number for float32."""


def to_float32(source: Path, target: Path) -> None:
    """Copy the model of ``source`` with every tensor converted to float32."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, ARCHITECTURE)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in SKIPPED_FIELDS:
            kinds = field.types
            writer.add_key_value(field.name, field.contents(), kinds[0], kinds[-1] if len(kinds) > 1 else None)
    writer.add_file_type(ALL_F32)
    for tensor in reader.tensors:
        values = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        writer.add_tensor(tensor.name, values, raw_dtype=GGMLQuantizationType.F32)
    _write(writer)


def export_adapter(source: Path, target: Path, shape: ModelShape) -> None:
    """Convert a PEFT adapter. Raises ValueError if it has more than A and B matrices with one alpha."""
    config = json.loads((source / CONFIG_FILE).read_text())
    for field in ("rank_pattern", "alpha_pattern", "use_dora", "use_rslora", "modules_to_save"):
        if config.get(field):
            raise ValueError(f"{source.name}: {field} is not converted to GGUF; use a plain adapter")
    writer = GGUFWriter(target, ARCHITECTURE)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(config["lora_alpha"]))
    for name, values in _tensors(source / WEIGHTS_FILE).items():
        layer, projection, matrix = _parts(name)
        if matrix == "b" and projection in ("q_proj", "k_proj"):
            values = permute(values, shape.heads if projection == "q_proj" else shape.kv_heads)
        writer.add_tensor(f"blk.{layer}.{NAMES[projection]}.weight.lora_{matrix}", np.ascontiguousarray(values))
    _write(writer)


def permute(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Reorder the rows of ``[out, in]``: llama.cpp interleaves the two rotary halves of a head, PEFT does not."""
    out_features, in_features = weight.shape
    half = out_features // heads // 2
    return weight.reshape(heads, 2, half, in_features).swapaxes(1, 2).reshape(out_features, in_features)


def _tensors(path: Path) -> dict[str, NDArray[np.float32]]:
    from safetensors.torch import load_file

    return {name: tensor.float().numpy() for name, tensor in load_file(path).items()}


def _parts(name: str) -> tuple[int, str, str]:
    """Return (3, "q_proj", "a") for ``...layers.3.self_attn.q_proj.lora_A.weight``."""
    words = name.split(".")
    layer = int(words[words.index("layers") + 1])
    return layer, words[-3], words[-2].removeprefix("lora_").lower()


def _write(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
