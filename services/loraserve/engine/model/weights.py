"""Loads a decoder's weights from a Hugging Face directory and converts them for a device, layer by layer."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from loraserve.engine.model.config import DecoderConfig
from loraserve.engine.model.linear import Linear
from loraserve.errors import ConfigError
from loraserve.model_shape import MODULES, SLICES

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REMEDY = "the directory must hold all of the model's files as they were published; fetch them again"

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_BLOCK = {"qkv": "self_attn", "o": "self_attn", "gate_up": "mlp", "down": "mlp"}


@dataclass(slots=True)
class LayerWeights:
    """Weights of one layer. ``head_norms`` are the norm weights [head_dim] of query and key heads, if any."""

    input_norm: torch.Tensor
    post_norm: torch.Tensor
    head_norms: tuple[torch.Tensor, torch.Tensor] | None
    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear


@dataclass(slots=True)
class DecoderWeights:
    """Weights of a decoder. ``embedding`` is [vocab, hidden]."""

    embedding: torch.Tensor
    layers: list[LayerWeights]
    norm: torch.Tensor
    head: Linear


class WeightForm(Protocol):
    """Converts loaded weights to the dtype, layout and device that an engine computes with.

    All given tensors are float32, except the embedding, which is a view of a mapped file and must be copied.
    """

    def embedding(self, weight: torch.Tensor) -> torch.Tensor:
        """Convert a copy of ``weight`` [vocab, hidden], which is mapped from the file and has the file's dtype."""
        ...

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear: ...

    def tied_head(self, embedding: torch.Tensor) -> Linear:
        """Return the output head of a model with tied embeddings. ``embedding`` has already been converted."""
        ...

    def vector(self, weight: torch.Tensor) -> torch.Tensor:
        """Convert the weight of a norm layer. The result is float32."""
        ...


def load_weights(
    model_dir: Path, config: DecoderConfig, form: WeightForm, progress: Callable[[str], None]
) -> DecoderWeights:
    """Load all weights. Raises ConfigError, which names the missing, unexpected or wrongly shaped tensor."""
    source = Checkpoint(model_dir)
    shape = config.shape
    embedding = form.embedding(source.take(EMBEDDING, (shape.vocab, shape.hidden)))
    if config.tied:
        source.skip(HEAD)
        head = form.tied_head(embedding)
    else:
        head = form.linear(_to_float32(source.take(HEAD, (shape.vocab, shape.hidden))), None)
    layers = []
    for layer in range(shape.layers):
        layers.append(_load_layer(source, config, layer, form))
        progress(f"loading weights: layer {layer + 1} of {shape.layers}")
    norm = form.vector(_to_float32(source.take(NORM, (shape.hidden,))))
    source.check_all_taken()
    return DecoderWeights(embedding, layers, norm, head)


def _load_layer(source: "Checkpoint", config: DecoderConfig, layer: int, form: WeightForm) -> LayerWeights:
    prefix = f"model.layers.{layer}."
    shape = config.shape

    def load_norm(name: str, width: int) -> torch.Tensor:
        return form.vector(_to_float32(source.take(f"{prefix}{name}.weight", (width,))))

    has_bias = {"qkv": config.qkv_bias, "o": config.o_bias, "gate_up": config.mlp_bias, "down": config.mlp_bias}
    linears = {}
    for module in MODULES:
        names = [f"{prefix}{_BLOCK[module]}.{projection}" for projection in SLICES[module]]
        widths = shape.out_features(module)
        weight = _stack(source, [f"{name}.weight" for name in names], [(w, shape.in_features(module)) for w in widths])
        bias = _stack(source, [f"{name}.bias" for name in names], [(w,) for w in widths]) if has_bias[module] else None
        linears[module] = form.linear(weight, bias)
    source.skip(f"{prefix}self_attn.rotary_emb.inv_freq")  # in old checkpoints, computed from config.json
    head_norms = None
    if config.qk_norm:
        head_norms = (load_norm("self_attn.q_norm", shape.head_dim), load_norm("self_attn.k_norm", shape.head_dim))
    return LayerWeights(
        input_norm=load_norm("input_layernorm", shape.hidden),
        post_norm=load_norm("post_attention_layernorm", shape.hidden),
        head_norms=head_norms,
        **linears,
    )


def _stack(source: "Checkpoint", names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> torch.Tensor:
    stacked = torch.empty(sum(shape[0] for shape in shapes), *shapes[0][1:], dtype=torch.float32)
    row = 0
    for name, shape in zip(names, shapes, strict=True):
        stacked[row : row + shape[0]] = source.take(name, shape)
        row += shape[0]
    return stacked


def _to_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.float32, copy=True)


class Checkpoint:
    """The tensors in the safetensors files of a directory. The files are mapped, so only taken tensors are read."""

    def __init__(self, model_dir: Path) -> None:
        self._dir = model_dir
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        for name in self._file_names():
            self._open(name)
        self._left = set(self._file_of)

    def take(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """Return the tensor in the file's dtype. Raises ConfigError if it is missing or has a wrong shape or dtype."""
        if name not in self._file_of:
            raise ConfigError(f"{self._dir}: tensor {name} is missing; {REMEDY}")
        tensor: torch.Tensor = self._files[self._file_of[name]].get_tensor(name)
        if tuple(tensor.shape) != tuple(shape):
            raise ConfigError(
                f"{self._dir}: tensor {name} has shape {list(tensor.shape)}, "
                f"config.json asks for {list(shape)}; {REMEDY}"
            )
        if tensor.dtype not in DTYPES:
            raise ConfigError(f"{self._dir}: tensor {name} is {tensor.dtype}; use float32, bfloat16 or float16 weights")
        self._left.discard(name)
        return tensor

    def skip(self, name: str) -> None:
        self._left.discard(name)

    def check_all_taken(self) -> None:
        """Raise ConfigError if a tensor was neither taken nor skipped. The model's results would be wrong."""
        if self._left:
            names = sorted(self._left)
            raise ConfigError(
                f"{self._dir}: {len(names)} tensors have no place in the model that config.json describes, "
                f"first {names[0]}; use the config.json that was published with these weights"
            )

    def _file_names(self) -> list[str]:
        index = self._dir / INDEX_FILE
        if not index.exists():
            if not (self._dir / SINGLE_FILE).exists():
                raise ConfigError(
                    f"{self._dir}: neither {SINGLE_FILE} nor {INDEX_FILE} is there; only safetensors are read"
                )
            return [SINGLE_FILE]
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            names = sorted(set(weight_map.values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{index}: not an index of safetensors files ({error!r}); {REMEDY}") from error
        outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
        if outside:
            raise ConfigError(f"{index}: {outside[0]!r} is not a file of this directory; {REMEDY}")
        return names

    def _open(self, name: str) -> None:
        try:
            self._files[name] = safe_open(self._dir / name, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{self._dir / name}: {error}; {REMEDY}") from error
        for tensor in self._files[name].keys():  # noqa: SIM118 - not a mapping
            self._file_of[tensor] = name
