"""The forward pass on the GPU: every token of a step, of any sequence and adapter, in one packed batch."""

import torch
from torch.nn import functional

from loraserve.engine.cuda.step_buffer import StepBuffer
from loraserve.engine.model.config import DecoderConfig
from loraserve.engine.model.decoder import rotary_tables
from loraserve.engine.model.weights import DecoderWeights, LayerWeights
from loraserve.kernels.attention.gpu import Backend, GpuAttentionBatch, GpuKvCache, attend
from loraserve.kernels.fused.gpu import add_rms_norm, rotate_and_keep, silu_mul
from loraserve.kernels.lora.gpu import add_lora
from loraserve.kernels.lora.tables import AdapterTables
from loraserve.kernels.lora.work import LoraWork
from loraserve.model_shape import DOWN, GATE_UP, OUT, QKV


class GpuDecoder:
    """A decoder with the KV cache and the adapter pool it computes on, all on one device and of one dtype."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: DecoderWeights,
        cache: GpuKvCache,
        pool: torch.Tensor,
        tables: AdapterTables,
        positions: int,
        attention: Backend,
    ) -> None:
        self._shape = config.shape
        self._eps = config.rms_eps
        self._weights = weights
        self._cache = cache
        self._pool = pool
        self._tables = tables
        self._attention = attention
        device = weights.embedding.device
        self._cos, self._sin = (
            table.to(device) for table in rotary_tables(config.rope, self._shape.head_dim, positions)
        )
        self._scale = self._shape.head_dim**-0.5

    def forward(
        self, step: StepBuffer, drawn: torch.Tensor, batch: GpuAttentionBatch, lora: LoraWork | None
    ) -> torch.Tensor:
        """Writes the KV of all tokens; returns logits [sampled rows, vocab].

        ``drawn`` int64 are the tokens of the step before; ``lora`` is None where nobody uses an adapter.
        """
        known = torch.where(step.source < 0, step.tokens, drawn[step.source.clamp(min=0)].int())
        if lora is not None:
            lora.plan(step.slots)
        x = functional.embedding(known, self._weights.embedding)
        delta = None
        for index, layer in enumerate(self._weights.layers):
            delta = self._layer(index, layer, x, delta, step, batch, lora)
        assert delta is not None
        last, change = x.index_select(0, step.sampled), delta.index_select(0, step.sampled)
        return self._weights.head(add_rms_norm(last, change, self._weights.norm, self._eps, torch.empty_like(last)))

    def _layer(
        self,
        index: int,
        layer: LayerWeights,
        x: torch.Tensor,
        delta: torch.Tensor | None,
        step: StepBuffer,
        batch: GpuAttentionBatch,
        lora: LoraWork | None,
    ) -> torch.Tensor:
        """One layer on the residual stream ``x``; what a layer adds to it is returned and added by the next norm."""
        shape, cache = self._shape, self._cache
        normed = add_rms_norm(x, delta, layer.input_norm, self._eps, torch.empty_like(x))
        qkv = self._adapted(layer.qkv(normed), normed, lora, index, QKV)
        q = torch.empty(x.shape[0], shape.heads, shape.head_dim, dtype=x.dtype, device=x.device)
        rotate_and_keep(
            qkv, q, cache.keys[index], cache.values[index], step.positions, step.kv_slots, self._cos, self._sin,
            layer.head_norms, self._eps,
        )  # fmt: skip
        attended = attend(q, cache, batch, index, self._scale, self._attention)
        delta = self._adapted(layer.o(attended), attended, lora, index, OUT)

        add_rms_norm(x, delta, layer.post_norm, self._eps, normed)
        gate_up = self._adapted(layer.gate_up(normed), normed, lora, index, GATE_UP)
        activated = torch.empty(x.shape[0], shape.ffn, dtype=x.dtype, device=x.device)
        silu_mul(gate_up, activated)
        return self._adapted(layer.down(activated), activated, lora, index, DOWN)

    def _adapted(
        self, y: torch.Tensor, x: torch.Tensor, lora: LoraWork | None, layer: int, module: int
    ) -> torch.Tensor:
        if lora is not None:
            add_lora(y, x, self._pool, self._tables, lora, layer, module)
        return y
