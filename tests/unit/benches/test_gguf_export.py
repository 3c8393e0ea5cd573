"""Files for llama.cpp: read back with the gguf package."""

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize, quantize
from peers.gguf_export import export_adapter, permute, to_float32

from loraserve.demo.gguf import unpermute
from loraserve.model_shape import ModelShape
from loraserve.testing.tiny_model import write_peft_adapter

SHAPE = ModelShape(layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=128)


def test_permute_is_the_inverse_of_the_import() -> None:
    weight = np.random.default_rng(0).standard_normal((32, 8), dtype=np.float32)
    assert np.array_equal(unpermute(permute(weight, 2), 2), weight)
    # Head 0: rows 0..7 of the first half meet rows 8..15 of the second.
    assert np.array_equal(permute(weight, 2)[:4], weight[[0, 8, 1, 9]])


def test_an_adapter_keeps_its_alpha_and_every_matrix(tmp_path: Path) -> None:
    source = write_peft_adapter(tmp_path / "peft", SHAPE, rank=6, targets=["q_proj", "k_proj", "down_proj"], alpha=12)
    export_adapter(source, tmp_path / "adapter.gguf", SHAPE)
    reader = GGUFReader(tmp_path / "adapter.gguf")
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    assert reader.fields["adapter.lora.alpha"].contents() == 12.0
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(found) == 2 * 3 * SHAPE.layers
    assert found["blk.1.attn_k.weight.lora_a"].shape == (6, 64)
    assert found["blk.1.attn_k.weight.lora_b"].shape == (32, 6)
    assert found["blk.0.ffn_down.weight.lora_a"].shape == (6, 96)


def test_only_query_and_key_rows_are_reordered(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    source = write_peft_adapter(tmp_path / "peft", SHAPE, rank=4, targets=["k_proj", "o_proj"])
    export_adapter(source, tmp_path / "adapter.gguf", SHAPE)
    found = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "adapter.gguf").tensors}
    given = {
        name.partition("layers.")[2]: values for name, values in load_file(source / "adapter_model.safetensors").items()
    }
    k = given["0.self_attn.k_proj.lora_B.weight"]
    assert np.array_equal(unpermute(found["blk.0.attn_k.weight.lora_b"], SHAPE.kv_heads), k)
    assert np.array_equal(found["blk.0.attn_k.weight.lora_a"], given["0.self_attn.k_proj.lora_A.weight"])
    assert np.array_equal(found["blk.0.attn_output.weight.lora_b"], given["0.self_attn.o_proj.lora_B.weight"])


def test_an_adapter_that_is_not_plain_lora_is_refused(tmp_path: Path) -> None:
    source = write_peft_adapter(tmp_path / "peft", SHAPE, rank=4, rank_pattern={"q_proj": 2})
    with pytest.raises(ValueError, match="rank_pattern is not converted"):
        export_adapter(source, tmp_path / "adapter.gguf", SHAPE)


def test_the_model_is_the_same_in_float32(tmp_path: Path) -> None:
    values = np.random.default_rng(1).standard_normal((4, 64), dtype=np.float32)
    packed = quantize(values, GGMLQuantizationType.Q8_0)
    writer = GGUFWriter(tmp_path / "q8.gguf", "llama")
    writer.add_block_count(7)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("token_embd.weight", packed, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    to_float32(tmp_path / "q8.gguf", tmp_path / "f32.gguf")
    reader = GGUFReader(tmp_path / "f32.gguf")
    assert reader.fields["llama.block_count"].contents() == 7
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
    (tensor,) = reader.tensors
    assert tensor.tensor_type == GGMLQuantizationType.F32
    assert np.array_equal(tensor.data, dequantize(packed, GGMLQuantizationType.Q8_0))
    assert json.loads(json.dumps(reader.fields["general.file_type"].contents())) == 0
