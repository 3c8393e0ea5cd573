"""The conversion gives a model that transformers loads and a tokenizer that splits as the model was trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraserve.demo.gguf import convert, hf_name, unpermute
from loraserve.errors import ConfigError

GgufFactory = Callable[..., Path]
Weights = NDArray[np.float32]


def permute(weight: Weights, heads: int) -> Weights:
    """Interleave the two halves of each head's rows, as the conversion to GGUF does."""
    size = weight.shape[0] // heads
    order = [head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return weight[order]


@pytest.mark.parametrize(("heads", "size"), [(1, 4), (3, 8), (9, 64)])
def test_unpermute_is_the_inverse(heads: int, size: int) -> None:
    weight = np.random.default_rng(0).standard_normal((heads * size, 5), dtype=np.float32)
    permuted = permute(weight, heads)
    assert not np.array_equal(permuted, weight)
    np.testing.assert_array_equal(unpermute(permuted, heads), weight)


def converted(source: Path, tmp_path: Path) -> Path:
    target = tmp_path / "converted"
    target.mkdir()
    convert(source, target, "Tiny", lambda line: None)
    return target


def test_transformers_loads_every_weight(write_gguf: GgufFactory, tmp_path: Path) -> None:
    source = write_gguf()
    target = converted(source, tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, output_loading_info=True)
    model, report = loaded
    assert {name: list(names) for name, names in report.items() if names} == {}
    assert model.config.rms_norm_eps == 1e-5
    assert model.config.tie_word_embeddings
    originals = {tensor.name: np.array(tensor.data) for tensor in GGUFReader(source).tensors}
    weights = load_file(target / "model.safetensors")
    assert len(weights) == len(originals)
    k = torch.from_numpy(unpermute(originals["blk.1.attn_k.weight"], 2)).to(torch.bfloat16)
    assert torch.equal(weights["model.layers.1.self_attn.k_proj.weight"], k)
    up = torch.from_numpy(originals["blk.0.ffn_up.weight"]).to(torch.bfloat16)
    assert torch.equal(weights["model.layers.0.mlp.up_proj.weight"], up)
    assert torch.isfinite(model(torch.tensor([[1, 5, 9]])).logits).all()


def test_the_tokenizer_merges_splits_digits_and_keeps_special_tokens_whole(
    write_gguf: GgufFactory, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted(write_gguf(), tmp_path))
    assert tokenizer.tokenize("hello 12") == ["hel", "l", "o", "Ġ", "1", "2"]
    assert tokenizer.tokenize("<|im_start|>a<|im_end|>") == ["<|im_start|>", "a", "<|im_end|>"]
    assert tokenizer.decode(tokenizer.encode("hello world")) == "hello world"
    assert tokenizer.eos_token == "<|im_end|>"
    chat = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "hello"


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"arch": "gemma"}, r"general\.architecture is 'gemma'"),
        ({"tokenizer": "llama"}, r"tokenizer\.ggml\.model is 'llama'"),
        ({"extra_tensor": "blk.0.attn_sinks"}, r"blk\.0\.attn_sinks"),
    ],
)
def test_unsupported_files_are_refused_by_field(
    write_gguf: GgufFactory, tmp_path: Path, asked: dict[str, str], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        converted(write_gguf(**asked), tmp_path)


@pytest.mark.parametrize("keep_bytes", [0, 3, 100, 2000])
def test_a_cut_or_foreign_file_is_refused(write_gguf: GgufFactory, tmp_path: Path, keep_bytes: int) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(write_gguf().read_bytes()[:keep_bytes])
    with pytest.raises(ConfigError, match=r"cut\.gguf is not a readable GGUF"):
        converted(cut, tmp_path)


def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"\x89PNG" * 500)
    with pytest.raises(ConfigError, match=r"other\.gguf is not a readable GGUF"):
        converted(other, tmp_path)


@pytest.mark.parametrize("name", ["blk.0.attn_q.bias", "rope_freqs.weight", "blk.0", "token_embd"])
def test_an_unknown_tensor_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        hf_name(name)
