"""The slab: an adapter as one contiguous run of elements, linear in its rank.

For each layer and fused module, in that order, a *row* of the layout: the A rows of the slices present, stacked
``[sum of r_i, in]``, then each present slice's transposed B, ``[r_i, out_i]``. What is absent takes no bytes. A
token x that uses the adapter adds ``scale_i * (x @ A_i.T) @ B_i^T`` to slice i of the module's output. Source:
DESIGN.md section 1.
"""

import hashlib
from typing import Literal

import msgspec

from loraserve.model_shape import MODULES, SLICES, ModelShape

SLAB_FORMAT = 1
ROW_ALIGN_ELEMENTS = 16
"""Rows start at multiples of this, so that kernels may use 128-bit loads at any of the dtypes."""

Dtype = Literal["float32", "bfloat16", "float16"]
ITEM_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


class LayoutRow(msgspec.Struct, frozen=True, array_like=True):
    """Where one (layer, module) lies: offset in elements from the slab's start, rank and scale of each slice.

    Rank 0 means that the slice is absent. ``ranks`` and ``scales`` are as long as ``SLICES[module]``.
    """

    offset: int
    ranks: tuple[int, ...]
    scales: tuple[float, ...]

    @property
    def total_rank(self) -> int:
        """Rows of the stacked A, and columns of the rank-space intermediate."""
        return sum(self.ranks)


class SlabHeader(msgspec.Struct, frozen=True):
    """Everything that is needed to read a slab. ``rows`` is layer-major, modules in ``MODULES`` order."""

    dtype: Dtype
    shape: ModelShape
    rank: int
    elements: int
    rows: tuple[LayoutRow, ...]
    format: int = SLAB_FORMAT

    @property
    def slab_bytes(self) -> int:
        return self.elements * ITEM_BYTES[self.dtype]

    def row(self, layer: int, module: int) -> LayoutRow:
        return self.rows[layer * len(MODULES) + module]


def row_elements(shape: ModelShape, module: str, ranks: tuple[int, ...]) -> int:
    """Elements that one row takes before alignment: stacked A, then each transposed B."""
    a = sum(ranks) * shape.in_features(module)
    return a + sum(r * out for r, out in zip(ranks, shape.out_features(module), strict=True))


def lay_out(
    shape: ModelShape,
    dtype: Dtype,
    ranks: list[tuple[int, ...]],
    scales: list[tuple[float, ...]],
) -> SlabHeader:
    """Header of a slab whose rows have the given per-slice ranks and scales (both layer-major)."""
    rows = []
    offset = 0
    for index, (row_ranks, row_scales) in enumerate(zip(ranks, scales, strict=True)):
        rows.append(LayoutRow(offset, row_ranks, row_scales))
        size = row_elements(shape, MODULES[index % len(MODULES)], row_ranks)
        offset += -(-size // ROW_ALIGN_ELEMENTS) * ROW_ALIGN_ELEMENTS
    largest = max((r for row in ranks for r in row), default=0)
    return SlabHeader(dtype=dtype, shape=shape, rank=largest, elements=offset, rows=tuple(rows))


def lay_out_uniform(shape: ModelShape, dtype: Dtype, rank: int, scale: float = 1.0) -> SlabHeader:
    """Header of a slab with the same rank and scale in every projection."""
    slices = [len(SLICES[module]) for _ in range(shape.layers) for module in MODULES]
    return lay_out(shape, dtype, [(rank,) * n for n in slices], [(scale,) * n for n in slices])


def encode_header(header: SlabHeader) -> bytes:
    """Canonical MessagePack bytes: equal headers give equal bytes, so they may be hashed."""
    return msgspec.msgpack.encode(header, order="deterministic")


def decode_header(data: bytes) -> SlabHeader:
    """Inverse of ``encode_header``. Raises msgspec.ValidationError on anything else."""
    return msgspec.msgpack.decode(data, type=SlabHeader, strict=True)


def slab_version(header: SlabHeader, slab: bytes | bytearray | memoryview) -> str:
    """The adapter's version: hex SHA-256 over the canonical header and the slab's bytes."""
    digest = hashlib.sha256(encode_header(header))
    digest.update(slab)
    return digest.hexdigest()
