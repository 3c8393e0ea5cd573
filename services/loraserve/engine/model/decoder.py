"""Rotary position embedding: the angles, once for all positions."""

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


def rotary_tables(rope: Rope, head_dim: int, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, float32 [positions, head_dim / 2] each."""
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), _inverse_frequencies(rope, head_dim))
    return angles.cos(), angles.sin()


def _inverse_frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.type == "linear":
        return frequencies / rope.factor
    if rope.type == "llama3":
        return _llama3(frequencies, rope)
    return frequencies


def _llama3(frequencies: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Llama 3.1's scaling: long waves are stretched by ``factor``, short ones kept, those between blended."""
    wavelengths = 2 * math.pi / frequencies
    turns = rope.original_positions / wavelengths
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / rope.factor + blend * frequencies


# MERGED: loraserve.engine.model.decoder
# """The forward pass: every token of a step, of any sequence and adapter, in one packed batch."""


class LayerGate(Protocol):
    def wait(self, layer: int) -> None:
        """Returns when this layer may be computed."""
        ...


@dataclass(slots=True)
class StepInputs:
    """Tokens of a step, packed sequence after sequence.

    ``tokens``, ``positions`` int64 [tokens]; ``sampled_rows`` int64: the rows whose logits are wanted.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    attention: AttentionBatch
    lora: LoraBatch
    sampled_rows: torch.Tensor


class Decoder:
    """A decoder with the KV cache and the adapter pool it computes on.

    With fp16 weights a token's logits have the same bits whatever shares its step and however its prompt was chunked.
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
        """Writes the KV of all tokens; returns float32 logits [sampled rows, vocab]. ``gate`` opens each layer."""
        x = functional.embedding(inputs.tokens, self._weights.embedding).float()
        delta = None
        buffers = self._buffers(x.shape[0])
        for index, layer in enumerate(self._weights.layers):
            if gate is not None:
                gate.wait(index)
            delta = self._layer(index, layer, x, delta, inputs, buffers)
        assert delta is not None
        rows = inputs.sampled_rows
        last = x.index_select(0, rows)
        normed = add_rms_norm(last, delta.index_select(0, rows), self._weights.norm, self._eps, torch.empty_like(last))
        return self._weights.head(normed)

    def _buffers(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normed input, queries and activated FFN; every layer uses them anew."""
        shape = self._shape
        return (
            torch.empty(tokens, shape.hidden),
            torch.empty(tokens, shape.heads, shape.head_dim),
            torch.empty(tokens, shape.ffn),
        )

    def _layer(
        self,
        index: int,
        layer: LayerWeights,
        x: torch.Tensor,
        delta: torch.Tensor | None,
        inputs: StepInputs,
        buffers: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """One layer on the residual stream ``x``; what a layer adds to it is returned and added by the next norm."""
        normed, q, activated = buffers
        pool, tables, lora = self._pool, self._tables, inputs.lora
        shape = self._shape

        add_rms_norm(x, delta, layer.input_norm, self._eps, normed)
        qkv = layer.qkv(normed)
        add_lora(qkv, normed, pool, tables, lora, index, QKV)
        rotate(qkv, inputs.positions, self._cos, self._sin, layer.head_norms, self._eps, q, shape.kv_heads)
        heads = qkv.view(-1, shape.heads + 2 * shape.kv_heads, shape.head_dim)
        k = heads[:, shape.heads : shape.heads + shape.kv_heads]
        v = heads[:, shape.heads + shape.kv_heads :]
        attended = paged_attention(q, k, v, self._cache, inputs.attention, index, self._scale)
        delta = layer.o(attended)
        add_lora(delta, attended, pool, tables, lora, index, OUT)

        add_rms_norm(x, delta, layer.post_norm, self._eps, normed)
        gate_up = layer.gate_up(normed)
        add_lora(gate_up, normed, pool, tables, lora, index, GATE_UP)
        silu_mul(gate_up, activated)
        delta = layer.down(activated)
        add_lora(delta, activated, pool, tables, lora, index, DOWN)
        return delta
