"""Paged causal attention on a CUDA GPU with torch's kernels, for prefill chunks and decode tokens in one step.

There are two backends. ``paged`` calls ``varlen_attn``, which reads the cache through block tables if the installed
FlashAttention supports them. ``gathered`` first copies the blocks into contiguous memory, which triples the memory
traffic. At start ``pick_backend`` tests ``paged``, and chooses ``gathered`` if the test fails.
"""

from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch
from torch.nn import functional

from loraserve.model_shape import ModelShape

Backend = Literal["paged", "gathered"]

GATHERED_TOKENS = 1 << 16
"""Number of KV tokens that ``gathered`` copies at a time for decoding sequences, to limit scratch memory."""


class GpuKvCache:
    """The KV cache. ``keys`` and ``values`` [layers, blocks, block_tokens, kv_heads, head_dim] start as zeros."""

    def __init__(
        self, shape: ModelShape, blocks: int, block_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        size = (shape.layers, blocks, block_tokens, shape.kv_heads, shape.head_dim)
        self.block_tokens = block_tokens
        self.keys = torch.zeros(size, dtype=dtype, device=device)
        self.values = torch.zeros(size, dtype=dtype, device=device)


def gpu_block_bytes(shape: ModelShape, block_tokens: int, dtype: torch.dtype) -> int:
    """Return the bytes that one block takes for keys and values in all layers."""
    return 2 * dtype.itemsize * shape.layers * shape.kv_heads * block_tokens * shape.head_dim


@dataclass(frozen=True)
class GpuAttentionBatch:
    """The sequences of one step. A sequence's query tokens are its last tokens.

    Tensors on the device: ``query_start`` int32 [sequences + 1], the cumulative number of query tokens; ``seq_len``
    int32 [sequences], the KV length including this step; ``table`` int32 [sequences, blocks]. ``queries`` and
    ``lengths``, on the host, are each sequence's number of query tokens and KV length. Captured graphs have neither.
    """

    query_start: torch.Tensor
    seq_len: torch.Tensor
    table: torch.Tensor
    queries: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()


def attend(
    q: torch.Tensor,  # [tokens, heads, dim]
    cache: GpuKvCache,
    batch: GpuAttentionBatch,
    layer: int,
    scale: float,
    backend: Backend,
) -> torch.Tensor:
    """Return causal attention softmax(scale * q k^T) v, [tokens, heads * dim].

    The caller has already stored this step's keys and values in the cache.
    """
    keys, values = cache.keys[layer], cache.values[layer]
    if backend == "paged":
        return _paged(q, keys, values, batch, scale).flatten(1)
    out = torch.empty_like(q)
    if batch.queries:
        _gathered(q, out, keys, values, batch, scale)
    else:
        _gathered_decode(q, out, keys, values, batch.table, batch.seq_len, scale)
    return out.flatten(1)


def pick_backend(shape: ModelShape, block_tokens: int, dtype: torch.dtype, device: torch.device) -> tuple[Backend, str]:
    """Return the backend and the reason for choosing it.

    ``paged`` is chosen if it gives the right result for a prompt chunk after a cached prefix and for a decode token.
    """
    if device.type != "cuda":
        return "gathered", "no GPU"
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return "gathered", f"torch {torch.__version__} has no varlen_attn"
    try:
        return _try_paged(shape, block_tokens, dtype, device)
    except (RuntimeError, TypeError, ValueError) as error:
        first_line = str(error).partition("\n")[0]
        return "gathered", f"varlen_attn with block tables: {first_line}"


def _activate_newer_flash_attention(device: torch.device) -> None:
    """Activate an installed FlashAttention that is newer than torch's own, which cannot read block tables."""
    import torch.nn.attention as attention

    newer = "FA3" if torch.cuda.get_device_capability(device) < (10, 0) else "FA4"
    activate = getattr(attention, "activate_flash_attention_impl", None)
    if activate is None:  # torch 2.11 has no such function
        return
    # If the newer one is missing or does not support this GPU, torch keeps its own.
    with suppress(ImportError, RuntimeError, ValueError, NotImplementedError):
        activate(newer)


def _try_paged(shape: ModelShape, block_tokens: int, dtype: torch.dtype, device: torch.device) -> tuple[Backend, str]:
    if device.type == "cuda":
        _activate_newer_flash_attention(device)
    cache = GpuKvCache(
        ModelShape(1, shape.hidden, shape.heads, shape.kv_heads, shape.head_dim, shape.ffn, shape.vocab),
        3, block_tokens, dtype, device,
    )  # fmt: skip
    cache.keys.normal_()
    cache.values.normal_()
    queries, lengths = (3, 1), (block_tokens + 3, block_tokens + 1)
    # Stale values after the end of a sequence's KV must have no effect. Even with weight 0, NaN gives NaN.
    cache.keys[:, 0, 3:] = cache.values[:, 0, 3:] = float("nan")

    def integers(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    batch = GpuAttentionBatch(
        integers(0, 3, 4), integers(*lengths), integers(2, 0, 1, 2).view(2, 2), queries=queries, lengths=lengths
    )
    q = torch.randn(sum(queries), shape.heads, shape.head_dim, dtype=dtype, device=device)
    paged, gathered = (attend(q, cache, batch, 0, shape.head_dim**-0.5, b) for b in ("paged", "gathered"))
    if not torch.allclose(paged.float(), gathered.float(), atol=2e-2, rtol=2e-2):
        return "gathered", "varlen_attn with block tables gave a wrong result"
    return "paged", "varlen_attn reads the block tables"


def _paged(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: GpuAttentionBatch, scale: float
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    result = varlen_attn(
        q,
        keys,
        values,
        batch.query_start,
        None,
        max(batch.queries, default=1),
        max(batch.lengths, default=batch.table.shape[1] * keys.shape[1]),
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=True,
        seqused_k=batch.seq_len,
        block_table=batch.table,
    )
    assert isinstance(result, torch.Tensor)  # it is a tuple only with auxiliary outputs
    return result


def _gathered(
    q: torch.Tensor, out: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: GpuAttentionBatch, scale: float
) -> None:
    """Write attention to ``out``, for adjacent decoding sequences together and for each prompt chunk separately."""
    token = index = 0
    for decode, run in groupby(batch.queries, lambda queries: queries == 1):
        for queries in [tuple(run)] if decode else [(n,) for n in run]:
            rows, sequences = slice(token, token + sum(queries)), slice(index, index + len(queries))
            length = max(batch.lengths[sequences])
            table = batch.table[sequences, : -(-length // keys.shape[1])]
            if decode:
                _gathered_decode(q[rows], out[rows], keys, values, table, batch.seq_len[sequences], scale)
            else:
                out[rows] = _gathered_prefill(q[rows], keys, values, table[0], length, scale)
            token, index = rows.stop, sequences.stop


def _gathered_decode(
    q: torch.Tensor, out: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor,
    seq_len: torch.Tensor, scale: float,
) -> None:  # fmt: skip
    """Write attention for one query per sequence to ``out``. The KV of a few sequences is copied at a time."""
    most, kv_heads = table.shape[1] * keys.shape[1], keys.shape[2]
    positions = torch.arange(most, device=q.device)
    rows = max(1, GATHERED_TOKENS // most)
    for start in range(0, len(q), rows):
        part = slice(start, start + rows)
        sequences, flat = len(table[part]), table[part].flatten()
        in_past = positions[None, :] < seq_len[part][:, None]
        # Stale values after the end of a sequence's KV must have no effect. Even with weight 0, NaN gives NaN.
        beyond = ~in_past[:, :, None, None]
        k, v = (
            kv.index_select(0, flat).view(sequences, -1, *kv.shape[2:]).masked_fill_(beyond, 0.0).transpose(1, 2)
            for kv in (keys, values)
        )
        # Query heads that share a KV head are passed as queries of one head, so the keys are not repeated.
        grouped = q[part].view(sequences, kv_heads, -1, q.shape[2])
        mask = in_past[:, None, None, :]
        attended = functional.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale)
        out[part] = attended.flatten(1, 2)


def _gathered_prefill(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, blocks: torch.Tensor, length: int, scale: float
) -> torch.Tensor:
    """Return the attention of one sequence's queries, [queries, heads, dim]. Its KV is in ``blocks``."""
    queries, kv_heads = q.shape[0], keys.shape[2]
    # Query heads that share a KV head are adjacent. ``expand`` repeats the keys for them without a copy.
    grouped = q.view(queries, kv_heads, -1, q.shape[2]).permute(1, 2, 0, 3)
    k, v = (
        part.index_select(0, blocks)
        .flatten(0, 1)[:length]
        .transpose(0, 1)[:, None]
        .expand(-1, grouped.shape[1], -1, -1)
        for part in (keys, values)
    )
    mask = None
    if queries != length:
        positions = torch.arange(length, device=q.device)
        mask = positions[None, :] <= positions[length - queries :, None]
    attended = functional.scaled_dot_product_attention(
        grouped, k, v, attn_mask=mask, is_causal=mask is None, scale=scale
    )
    return attended.permute(2, 0, 1, 3).flatten(1, 2)
