"""Paged causal attention on a CUDA GPU by torch's own kernels, prefill chunks and decode tokens in one step.

``varlen_attn`` reads the cache through block tables where the installed torch and its FlashAttention can; elsewhere the
blocks are gathered first, which costs three times the memory traffic. Which of the two is tried out once.
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
"""KV of those who decode that is copied at a time. All of it at once takes more memory than is set aside for a step."""


class GpuKvCache:
    """``keys`` and ``values`` [layers, blocks, block_tokens, kv_heads, head_dim]; zero at first, so never NaN."""

    def __init__(
        self, shape: ModelShape, blocks: int, block_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        size = (shape.layers, blocks, block_tokens, shape.kv_heads, shape.head_dim)
        self.block_tokens = block_tokens
        self.keys = torch.zeros(size, dtype=dtype, device=device)
        self.values = torch.zeros(size, dtype=dtype, device=device)


def gpu_block_bytes(shape: ModelShape, block_tokens: int, dtype: torch.dtype) -> int:
    """Memory of one block over all layers, keys and values."""
    return 2 * dtype.itemsize * shape.layers * shape.kv_heads * block_tokens * shape.head_dim


@dataclass(frozen=True)
class GpuAttentionBatch:
    """Sequences of a step, one after the other; their queries are the last tokens of their KV.

    On the device: ``query_start`` int32 [sequences + 1], ``seq_len`` int32 [sequences] with this step's tokens,
    ``table`` int32 [sequences, blocks]. On the host: ``queries`` and ``lengths`` are the same numbers, but empty where
    every sequence has one query and any length that ``table`` holds, as in a captured graph.
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
    """softmax(scale * q k^T) v over each token's own past and itself, [tokens, heads * dim]; its KV is kept already."""
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
    """(backend, why): ``paged`` where a chunk behind a cached prefix and a decode, over two blocks, come out right."""
    if device.type != "cuda":
        return "gathered", "no GPU"
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return "gathered", f"torch {torch.__version__} has no varlen_attn"
    try:
        return _try_paged(shape, block_tokens, dtype, device)
    except (RuntimeError, TypeError, ValueError) as error:
        return "gathered", f"varlen_attn with block tables: {_first_line(error)}"


def _activate_installed_flash_attention(device: torch.device) -> None:
    """torch's own FlashAttention reads no block tables; a newer one, where it is installed, takes its place."""
    import torch.nn.attention as attention

    newer = "FA3" if torch.cuda.get_device_capability(device) < (10, 0) else "FA4"
    activate = getattr(attention, "activate_flash_attention_impl", None)
    if activate is None:  # torch 2.11
        return
    # Where it is not there, or not for this GPU, torch's own stays.
    with suppress(ImportError, RuntimeError, ValueError, NotImplementedError):
        activate(newer)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _try_paged(shape: ModelShape, block_tokens: int, dtype: torch.dtype, device: torch.device) -> tuple[Backend, str]:
    if device.type == "cuda":
        _activate_installed_flash_attention(device)
    cache = GpuKvCache(
        ModelShape(1, shape.hidden, shape.heads, shape.kv_heads, shape.head_dim, shape.ffn, shape.vocab),
        3, block_tokens, dtype, device,
    )  # fmt: skip
    cache.keys.normal_()
    cache.values.normal_()
    queries, lengths = (3, 1), (block_tokens + 3, block_tokens + 1)
    # What a request left behind the end of another's KV must not count, not even as 0 * NaN.
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
    assert isinstance(result, torch.Tensor)  # no auxiliary output was asked for
    return result


def _gathered(
    q: torch.Tensor,
    out: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: GpuAttentionBatch,
    scale: float,
) -> None:
    """Neighbours that decode are computed together, prompts one by one."""
    token = index = 0
    for decode, run in groupby(batch.queries, lambda queries: queries == 1):
        for queries in [tuple(run)] if decode else [(n,) for n in run]:
            rows, own = slice(token, token + sum(queries)), slice(index, index + len(queries))
            length = max(batch.lengths[own])
            table = batch.table[own, : -(-length // keys.shape[1])]
            if decode:
                _gathered_decode(q[rows], out[rows], keys, values, table, batch.seq_len[own], scale)
            else:
                out[rows] = _gathered_prefill(q[rows], keys, values, table[0], length, scale)
            token, index = rows.stop, own.stop


def _gathered_decode(
    q: torch.Tensor,
    out: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    seq_len: torch.Tensor,
    scale: float,
) -> None:
    """One query a sequence over as many blocks as the table is wide, GATHERED_TOKENS at a time."""
    rows = max(1, GATHERED_TOKENS // (table.shape[1] * keys.shape[1]))
    for start in range(0, len(q), rows):
        own = slice(start, start + rows)
        _decode_together(q[own], out[own], keys, values, table[own], seq_len[own], scale)


def _decode_together(
    q: torch.Tensor,
    out: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    seq_len: torch.Tensor,
    scale: float,
) -> None:
    sequences, blocks = table.shape
    places = torch.arange(blocks * keys.shape[1], device=q.device)
    past = places[None, :] < seq_len[:, None]
    flat = table.flatten()
    # What others left in the blocks beyond the past must not count, not even as 0 * NaN.
    beyond = ~past[:, :, None, None]
    k, v = (
        part.index_select(0, flat).view(sequences, -1, *part.shape[2:]).masked_fill_(beyond, 0.0).transpose(1, 2)
        for part in (keys, values)
    )
    # Queries that share a key head pose as queries of one head, so that no kernel has to repeat keys for them.
    grouped = q.view(sequences, keys.shape[2], -1, q.shape[2])
    attended = functional.scaled_dot_product_attention(grouped, k, v, attn_mask=past[:, None, None, :], scale=scale)
    out.copy_(attended.flatten(1, 2))


def _gathered_prefill(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, blocks: torch.Tensor, length: int, scale: float
) -> torch.Tensor:
    """The queries of one sequence, [queries, heads, dim]."""
    queries, kv_heads = q.shape[0], keys.shape[2]
    # Heads that share keys are together; their keys are a view that names the same ones for each.
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
        places = torch.arange(length, device=q.device)
        mask = places[None, :] <= places[length - queries :, None]
    attended = functional.scaled_dot_product_attention(
        grouped, k, v, attn_mask=mask, is_causal=mask is None, scale=scale
    )
    return attended.permute(2, 0, 1, 3).flatten(1, 2)
