"""The forward pass on the CPU. It computes all sequences of a step, with their adapters, as one packed batch."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from loraserve.engine.model.config import DecoderConfig, Rope
from loraserve.engine.model.weights import DecoderWeights, LayerWeights
from loraserve.kernels.attention import AttentionBatch, KvCache, paged_attention
from loraserve.kernels.fused.cpu import add_rms_norm, rotate, silu_mul
from loraserve.kernels.lora import AdapterTables, LoraBatch, add_lora
from loraserve.model_shape import DOWN, GATE_UP, OUT, QKV


class LayerGate(Protocol):
    def wait(self, layer: int) -> None:
        """Wait until the decoder may compute this layer."""
        ...


@dataclass(slots=True)
class StepInputs:
    """The tokens of a step, packed sequence after sequence.

    ``tokens`` and ``positions`` are int64 [tokens]. ``sampled_rows`` int64 holds indices of tokens that need logits.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    attention: AttentionBatch
    lora: LoraBatch
    sampled_rows: torch.Tensor


@dataclass(slots=True)
class _LayerBuffers:
    """Buffers that all layers reuse: normalised input, queries and FFN activations."""

    normed: torch.Tensor
    q: torch.Tensor
    activated: torch.Tensor


class Decoder:
    """A decoder with its KV cache and its adapter pool.

    With fp16 weights, the bits of a token's logits depend neither on the batch nor on how the prompt was chunked.
    """

    def __init__(
        self,
        config: DecoderConfig,
        weights: DecoderWeights,
        cache: KvCache,
        pool: torch.Tensor,
        tables: AdapterTables,
        positions: int,
    ) -> None:
        self._shape = config.shape
        self._eps = config.rms_eps
        self._weights = weights
        self._cache = cache
        self._pool = pool
        self._tables = tables
        self._cos, self._sin = rotary_tables(config.rope, config.shape.head_dim, positions)
        self._scale = config.shape.head_dim**-0.5

    def forward(self, inputs: StepInputs, gate: LayerGate | None = None) -> torch.Tensor:
        """Write the KV of all tokens and return float32 logits [sampled rows, vocab]. ``gate`` may delay each layer."""
        x = functional.embedding(inputs.tokens, self._weights.embedding).float()
        delta = None
        buffers = self._allocate_buffers(x.shape[0])
        for index, layer in enumerate(self._weights.layers):
            if gate is not None:
                gate.wait(index)
            delta = self._layer(index, layer, x, delta, inputs, buffers)
        assert delta is not None
        rows = inputs.sampled_rows
        last = x.index_select(0, rows)
        normed = add_rms_norm(last, delta.index_select(0, rows), self._weights.norm, self._eps, torch.empty_like(last))
        return self._weights.head(normed)

    def _allocate_buffers(self, tokens: int) -> _LayerBuffers:
        shape = self._shape
        return _LayerBuffers(
            normed=torch.empty(tokens, shape.hidden),
            q=torch.empty(tokens, shape.heads, shape.head_dim),
            activated=torch.empty(tokens, shape.ffn),
        )

    def _layer(
        self,
        index: int,
        layer: LayerWeights,
        x: torch.Tensor,
        delta: torch.Tensor | None,
        inputs: StepInputs,
        buffers: _LayerBuffers,
    ) -> torch.Tensor:
        """Add ``delta`` to the residual stream ``x`` and return this layer's output, the next layer's ``delta``."""
        normed, q, activated = buffers.normed, buffers.q, buffers.activated
        shape = self._shape

        add_rms_norm(x, delta, layer.input_norm, self._eps, normed)
        qkv = layer.qkv(normed)
        self._add_lora(qkv, normed, inputs.lora, index, QKV)
        rotate(
            qkv=qkv,
            positions=inputs.positions,
            cos=self._cos,
            sin=self._sin,
            norms=layer.head_norms,
            eps=self._eps,
            q=q,
            kv_heads=shape.kv_heads,
        )
        heads = qkv.view(-1, shape.heads + 2 * shape.kv_heads, shape.head_dim)
        k = heads[:, shape.heads : shape.heads + shape.kv_heads]
        v = heads[:, shape.heads + shape.kv_heads :]
        attended = paged_attention(
            q=q, k=k, v=v, cache=self._cache, batch=inputs.attention, layer=index, scale=self._scale
        )
        delta = layer.o(attended)
        self._add_lora(delta, attended, inputs.lora, index, OUT)

        add_rms_norm(x, delta, layer.post_norm, self._eps, normed)
        gate_up = layer.gate_up(normed)
        self._add_lora(gate_up, normed, inputs.lora, index, GATE_UP)
        silu_mul(gate_up, activated)
        delta = layer.down(activated)
        self._add_lora(delta, activated, inputs.lora, index, DOWN)
        return delta

    def _add_lora(self, y: torch.Tensor, x: torch.Tensor, batch: LoraBatch, layer: int, module: int) -> None:
        add_lora(y=y, x=x, pool=self._pool, tables=self._tables, batch=batch, layer=layer, module=module)


def rotary_tables(rope: Rope, head_dim: int, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cosines and sines of the rotary angles, each float32 [positions, head_dim / 2]."""
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), _inverse_frequencies(rope, head_dim))
    return angles.cos(), angles.sin()


def _inverse_frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.type == "linear":
        return frequencies / rope.factor
    if rope.type == "llama3":
        return _scale_llama3(frequencies, rope)
    return frequencies


def _scale_llama3(frequencies: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Apply Llama 3.1's RoPE scaling: divide low frequencies by ``factor``, keep high ones, blend between them."""
    wavelengths = 2 * math.pi / frequencies
    turns = rope.original_positions / wavelengths
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / rope.factor + blend * frequencies
