"""A small random GGUF file."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

HIDDEN, HEADS, KV_HEADS, FFN, LAYERS, CONTEXT = 16, 4, 2, 32, 2, 64
TEXTS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefghijklmnopqrstuvwxyz0123456789Ġ", "he", "hel"]
MERGES = ["h e", "he l"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def layer_shapes() -> dict[str, tuple[int, ...]]:
    kv = HIDDEN // HEADS * KV_HEADS
    return {
        "attn_norm": (HIDDEN,),
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (kv, HIDDEN),
        "attn_v": (kv, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_norm": (HIDDEN,),
        "ffn_gate": (FFN, HIDDEN),
        "ffn_up": (FFN, HIDDEN),
        "ffn_down": (HIDDEN, FFN),
    }


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(TEXTS), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in layer_shapes().items()}
    return shapes


def add_metadata(writer: gguf.GGUFWriter, tokenizer: str) -> None:
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(tokenizer)
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TEXTS)
    writer.add_token_types([3] * 3 + [1] * (len(TEXTS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)


GgufFactory = Callable[..., Path]


@pytest.fixture
def write_gguf(tmp_path: Path) -> GgufFactory:
    """Return a function that writes a tiny random model in float32 for an architecture and a tokenizer."""

    def write(arch: str = "llama", tokenizer: str = "gpt2", extra_tensor: str | None = None) -> Path:
        path = tmp_path / f"{arch}-{tokenizer}.gguf"
        writer = gguf.GGUFWriter(path, arch)
        add_metadata(writer, tokenizer)
        rng = np.random.default_rng(0)
        shapes = tensor_shapes() | ({extra_tensor: (HIDDEN,)} if extra_tensor else {})
        for name, shape in shapes.items():
            writer.add_tensor(f"{name}.weight", rng.standard_normal(shape, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write
