"""The forward pass on the GPU. It computes all sequences of a step, with their adapters, as one packed batch.

All integer inputs of a step are sent to the device in one copy.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from loraserve.engine.compute.protocol import PackedStep
from loraserve.engine.model.config import DecoderConfig
from loraserve.engine.model.decoder import rotary_tables
from loraserve.engine.model.weights import DecoderWeights, LayerWeights
from loraserve.kernels.attention.gpu import Backend, GpuAttentionBatch, GpuKvCache, attend
from loraserve.kernels.fused.gpu import add_rms_norm, rotate_and_store, silu_mul
from loraserve.kernels.lora.gpu import add_lora
from loraserve.kernels.lora.tables import AdapterTables
from loraserve.kernels.lora.work import LoraWork
from loraserve.model_shape import DOWN, GATE_UP, OUT, QKV

NONE = -1
"""Means a known token in ``source``, no adapter in ``slots``, and KV that is not stored in ``kv_slots``."""


@dataclass(frozen=True)
class BufferSize:
    """Capacity of a StepBuffer. ``blocks`` counts KV blocks per sequence, ``sampled`` the tokens that need logits."""

    tokens: int
    sequences: int
    blocks: int
    sampled: int

    def view_lengths(self) -> tuple[int, ...]:
        per_token = (self.tokens,) * 5
        return (*per_token, self.sequences + 1, self.sequences, self.sequences * self.blocks, self.sampled)


class StepBuffer:
    """int32 views of one device buffer. Captured graphs can read them, because their addresses never change.

    ``tokens``, ``source``, ``positions``, ``slots`` and ``kv_slots`` are [tokens], ``query_start`` is [sequences + 1],
    ``seq_len`` is [sequences], ``table`` is [sequences, blocks], and ``sampled`` is [sampled]. If the preceding
    step is still sampling a token, ``source`` is its row among that step's sampled tokens. Otherwise, it is NONE.
    """

    def __init__(self, size: BufferSize, device: torch.device) -> None:
        self.size = size
        self._lengths = size.view_lengths()
        self._memory = torch.zeros(sum(self._lengths), dtype=torch.int32, device=device)
        views = torch.split(self._memory, list(self._lengths))
        self.tokens, self.source, self.positions, self.slots, self.kv_slots = views[:5]
        self.query_start, self.seq_len, table, self.sampled = views[5:]
        self.table = table.view(size.sequences, size.blocks)

    def send(self, packed: PackedStep, source: NDArray[np.int32]) -> None:
        """Copy a step to the device without waiting for the copy.

        Unused capacity is filled with dummy sequences of one token, which use no adapter and store no KV. This works
        only for decode steps, in which every sequence has one token. Other steps must fill the buffer exactly.
        """
        memory = torch.empty(len(self._memory), dtype=torch.int32, pin_memory=self._memory.is_cuda)
        self._fill(memory.numpy(), packed, source)
        self._memory.copy_(memory, non_blocking=True)

    def _fill(self, memory: NDArray[np.int32], packed: PackedStep, source: NDArray[np.int32]) -> None:
        parts = np.split(memory, np.cumsum(self._lengths)[:-1])
        tokens, source_part, positions, slots, kv_slots, query_start, seq_len, table, sampled = parts
        used, sequences = len(packed.tokens), len(packed.seq_len)
        for part, values, padding in (
            (tokens, packed.tokens, 0),
            (source_part, source, NONE),
            (positions, packed.positions, 0),
            (slots, packed.slots, NONE),
            (kv_slots, packed.kv_slots, NONE),
            (seq_len, packed.seq_len, 1),
        ):
            part[: len(values)] = values
            part[len(values) :] = padding
        query_start[: sequences + 1] = packed.query_start
        query_start[sequences + 1 :] = used + 1 + np.arange(len(query_start) - sequences - 1)
        rows = table.reshape(self.size.sequences, self.size.blocks)
        rows[:] = 0
        rows[:sequences, : packed.table.shape[1]] = packed.table
        sampled[: len(packed.sampled)] = packed.sampled
        sampled[len(packed.sampled) :] = used + np.arange(len(sampled) - len(packed.sampled))


@dataclass(frozen=True)
class GpuStepInputs:
    """The decoder's inputs for one step. ``lora`` is None if no token uses an adapter."""

    buffer: StepBuffer
    attention: GpuAttentionBatch
    lora: LoraWork | None

    @classmethod
    def of_exact_size(
        cls, packed: PackedStep, source: NDArray[np.int32], lora: LoraWork | None, device: torch.device
    ) -> "GpuStepInputs":
        """Return the inputs of one step in a new buffer without padding. Does not wait for the copy to the device."""
        sequences, blocks = packed.table.shape
        buffer = StepBuffer(BufferSize(len(packed.tokens), sequences, blocks, len(packed.sampled)), device)
        buffer.send(packed, source)
        queries, lengths = tuple(packed.queries.tolist()), tuple(packed.seq_len.tolist())
        attention = GpuAttentionBatch(buffer.query_start, buffer.seq_len, buffer.table, queries, lengths)
        return cls(buffer, attention, lora)


@dataclass(frozen=True)
class DecoderMemory:
    cache: GpuKvCache
    pool: torch.Tensor
    tables: AdapterTables


class GpuDecoder:
    """A decoder with its KV cache and adapter pool on one device, all of one dtype except the float32 norm weights."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: DecoderWeights,
        memory: DecoderMemory,
        positions: int,
        attention: Backend,
    ) -> None:
        self._shape = config.shape
        self._eps = config.rms_eps
        self._weights = weights
        self._memory = memory
        self._attention = attention
        device = weights.embedding.device
        self._cos, self._sin = (
            table.to(device) for table in rotary_tables(config.rope, self._shape.head_dim, positions)
        )
        self._scale = self._shape.head_dim**-0.5

    def forward(self, inputs: GpuStepInputs, previous_tokens: torch.Tensor) -> torch.Tensor:
        """Write the KV of all tokens and return logits [sampled rows, vocab].

        ``previous_tokens`` int64 holds the tokens sampled in the preceding step.
        """
        buffer, lora = inputs.buffer, inputs.lora
        pending = previous_tokens[buffer.source.clamp(min=0)].int()
        tokens = torch.where(buffer.source < 0, buffer.tokens, pending)
        if lora is not None:
            lora.plan(buffer.slots)
        x = functional.embedding(tokens, self._weights.embedding)
        delta = None
        for index, layer in enumerate(self._weights.layers):
            delta = self._layer(index, layer, x, delta, inputs)
        assert delta is not None
        last, change = x.index_select(0, buffer.sampled), delta.index_select(0, buffer.sampled)
        return self._weights.head(add_rms_norm(last, change, self._weights.norm, self._eps, torch.empty_like(last)))

    def _layer(
        self, index: int, layer: LayerWeights, x: torch.Tensor, delta: torch.Tensor | None, inputs: GpuStepInputs
    ) -> torch.Tensor:
        """Add ``delta`` to the residual stream ``x`` and return this layer's output, the next layer's ``delta``."""
        shape, cache, lora = self._shape, self._memory.cache, inputs.lora
        normed = add_rms_norm(x, delta, layer.input_norm, self._eps, torch.empty_like(x))
        qkv = self._add_lora(layer.qkv(normed), normed, lora, index, QKV)
        q = torch.empty(x.shape[0], shape.heads, shape.head_dim, dtype=x.dtype, device=x.device)
        rotate_and_store(
            qkv=qkv,
            q=q,
            keys=cache.keys[index],
            values=cache.values[index],
            positions=inputs.buffer.positions,
            kv_slot=inputs.buffer.kv_slots,
            cos=self._cos,
            sin=self._sin,
            norms=layer.head_norms,
            eps=self._eps,
        )
        attended = attend(
            q=q, cache=cache, batch=inputs.attention, layer=index, scale=self._scale, backend=self._attention
        )
        delta = self._add_lora(layer.o(attended), attended, lora, index, OUT)

        add_rms_norm(x, delta, layer.post_norm, self._eps, normed)
        gate_up = self._add_lora(layer.gate_up(normed), normed, lora, index, GATE_UP)
        activated = torch.empty(x.shape[0], shape.ffn, dtype=x.dtype, device=x.device)
        silu_mul(gate_up, activated)
        return self._add_lora(layer.down(activated), activated, lora, index, DOWN)

    def _add_lora(
        self, y: torch.Tensor, x: torch.Tensor, lora: LoraWork | None, layer: int, module: int
    ) -> torch.Tensor:
        if lora is not None:
            memory = self._memory
            add_lora(y=y, x=x, pool=memory.pool, tables=memory.tables, batch=lora, layer=layer, module=module)
        return y
