"""Converts a GGUF file of the llama architecture to a Hugging Face directory with bf16 weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from loraserve.demo.weights import save_weights
from loraserve.errors import ConfigError

TOP_LEVEL = {
    "token_embd": "model.embed_tokens.weight",
    "output_norm": "model.norm.weight",
    "output": "lm_head.weight",
}
PER_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SPECIAL_TOKEN_TYPE = 3
TENSORS_PER_REPORT = 68


class Metadata:
    def __init__(self, reader: GGUFReader) -> None:
        self._fields = reader.fields

    def get(self, key: str, default: Any = None) -> Any:
        return self._fields[key].contents() if key in self._fields else default

    def __getitem__(self, key: str) -> Any:
        """Return the value of ``key``. Raises ConfigError if the file has no such key."""
        if key not in self._fields:
            raise ConfigError(f"the GGUF file has no field {key!r}; use a complete llama-architecture file")
        return self.get(key)

    def token(self, key: str) -> str:
        return str(self["tokenizer.ggml.tokens"][self[key]])


def convert(source: Path, target: Path, name: str, progress: Callable[[str], None]) -> None:
    """Convert the GGUF file ``source`` and write config, tokenizer and weights to the existing folder ``target``.

    ``name`` is the model's name in the config. Raises ConfigError if the file is damaged or is not a llama model with a
    byte-level BPE tokenizer. Raises OSError if ``target`` cannot be written.
    """
    try:
        reader = GGUFReader(source)
    except (ValueError, IndexError, OverflowError) as error:
        raise ConfigError(f"{source.name} is not a readable GGUF file ({error}); download it again") from error
    metadata = Metadata(reader)
    check_supported(metadata)
    write_tokenizer(metadata, target)
    tensors = read_tensors(reader, metadata, progress)
    save_weights(tensors, target / "model.safetensors")
    write_json(target / "config.json", model_config(metadata, name, tied="lm_head.weight" not in tensors))
    tokens = {role: metadata[f"tokenizer.ggml.{role}_token_id"] for role in ("bos", "eos")}
    write_json(target / "generation_config.json", {f"{role}_token_id": id_ for role, id_ in tokens.items()})


def check_supported(metadata: Metadata) -> None:
    """Raise ConfigError if the architecture, the tokenizer or the RoPE scaling is not supported."""
    wanted = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2"}
    for key, value in wanted.items():
        if metadata[key] != value:
            raise ConfigError(f"GGUF field {key} is {metadata[key]!r}, only {value!r} can be converted")
    if metadata.get("llama.rope.scaling.type", "none") != "none":
        raise ConfigError("GGUF field llama.rope.scaling.type: scaled rotary embeddings cannot be converted")


def read_tensors(reader: GGUFReader, metadata: Metadata, progress: Callable[[str], None]) -> dict[str, torch.Tensor]:
    """Return all weights in bf16, by Hugging Face name. Matrices have shape ``[out, in]``."""
    heads = {"attn_q": metadata["llama.attention.head_count"], "attn_k": metadata["llama.attention.head_count_kv"]}
    tensors = {}
    for done, tensor in enumerate(reader.tensors):
        if done % TENSORS_PER_REPORT == 0:
            progress(f"converting the weights: {done} of {len(reader.tensors)} tensors")
        weight = dequantize(tensor.data, tensor.tensor_type)
        kind = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else ""
        if kind in heads:
            weight = unpermute(weight, heads[kind])
        tensors[hf_name(tensor.name)] = torch.from_numpy(np.array(weight, dtype=np.float32)).to(torch.bfloat16)
    return tensors


def hf_name(gguf_name: str) -> str:
    """Return ``model.layers.3.self_attn.q_proj.weight`` for ``blk.3.attn_q.weight``. Raises ConfigError if unknown."""
    match gguf_name.split("."):
        case ["blk", layer, kind, "weight"] if kind in PER_LAYER:
            return f"model.layers.{layer}.{PER_LAYER[kind]}.weight"
        case [kind, "weight"] if kind in TOP_LEVEL:
            return TOP_LEVEL[kind]
    raise ConfigError(f"GGUF tensor {gguf_name!r} is not part of a Llama model")


def unpermute(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Reorder the rows of ``[out, in]`` from GGUF's interleaved rotary pairs to Hugging Face's two halves per head."""
    out_features, in_features = weight.shape
    half = out_features // heads // 2
    return weight.reshape(heads, half, 2, in_features).swapaxes(1, 2).reshape(out_features, in_features)


def model_config(metadata: Metadata, name: str, tied: bool) -> dict[str, Any]:
    hidden, heads = metadata["llama.embedding_length"], metadata["llama.attention.head_count"]
    # GGUF stores float32, in which 1e-5 reads as 9.999999747e-06. Rounding restores 1e-5.
    eps = float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}")
    return {
        "_name_or_path": name,
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "head_dim": metadata.get("llama.rope.dimension_count", hidden // heads),
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "max_position_embeddings": metadata["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": metadata["llama.block_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "rms_norm_eps": eps,
        "rope_scaling": None,
        "rope_theta": metadata["llama.rope.freq_base"],
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
    }


def write_tokenizer(metadata: Metadata, target: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    build_tokenizer(metadata).save(str(target / "tokenizer.json"))
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    keys = {token: f"tokenizer.ggml.{role}_token_id" for token, role in roles.items()}
    tokens = {token: metadata.token(key) for token, key in keys.items() if metadata.get(key) is not None}
    config = tokens | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "chat_template": metadata["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
    }
    write_json(target / "tokenizer_config.json", config)


def build_tokenizer(metadata: Metadata) -> Tokenizer:
    """Return the tokenizer. GGUF files only name the pre-tokenizer, so this function defines its steps."""
    texts = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={text: id_ for id_, text in enumerate(texts)}, merges=merges))
    steps: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    if metadata.get("tokenizer.ggml.pre") == "smollm":
        # SmolLM was trained with one token per digit.
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]
    special = [text for text, kind in zip(texts, kinds, strict=True) if kind == SPECIAL_TOKEN_TYPE]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return tokenizer


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
