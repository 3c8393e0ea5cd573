"""The slab: an adapter as one contiguous run of elements, linear in its rank.

For each layer and fused module, in that order, a *row* of the layout: the A rows of the slices present, stacked
``[sum of r_i, in]``, then each present slice's transposed B, ``[r_i, out_i]``. What is absent takes no bytes. A
token x that uses the adapter adds ``scale_i * (x @ A_i.T) @ B_i^T`` to slice i of the module's output. Source:
DESIGN.md section 1.

The header holds a digest of each layer's bytes, and its own digest is the version: a header is verified by itself, and
then each layer alone, in any thread, as soon as its bytes are there. Layers are digested by BLAKE3, which takes a fifth
of the time that SHA-256 does (5.3 GiB/s a thread beside 1.1, Intel Xeon with AVX-512 and SHA instructions): every load
pays it. Source: https://github.com/BLAKE3-team/BLAKE3-specs.
"""

import hashlib
from typing import Annotated, Literal

import msgspec
from blake3 import blake3

from loraserve.model_shape import MODULES, SLICES, ModelShape

SLAB_FORMAT = 3
ROW_ALIGN_ELEMENTS = 16
"""Rows start at multiples of this, so that kernels may use 128-bit loads at any of the dtypes."""

Dtype = Literal["float32", "bfloat16", "float16"]
Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
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
    """Everything that is needed to read a slab. ``rows`` is layer-major, modules in ``MODULES`` order.

    ``layer_digests`` are the BLAKE3 of each ``layer``'s bytes; a header without them is a layout, not sealed yet.
    """

    dtype: Dtype
    shape: ModelShape
    rank: int
    elements: int
    rows: tuple[LayoutRow, ...]
    layer_digests: tuple[Digest, ...] = ()
    format: int = SLAB_FORMAT

    @property
    def slab_bytes(self) -> int:
        return self.elements * ITEM_BYTES[self.dtype]

    @property
    def sealed(self) -> bool:
        return len(self.layer_digests) == self.shape.layers

    def row(self, layer: int, module: int) -> LayoutRow:
        return self.rows[layer * len(MODULES) + module]

    def layer(self, layer: int) -> range:
        """The bytes of one layer in the slab. The layers' follow each other, the last to the slab's end."""
        last = layer + 1 == self.shape.layers
        end = self.elements if last else self.row(layer + 1, 0).offset
        return range(self.row(layer, 0).offset * ITEM_BYTES[self.dtype], end * ITEM_BYTES[self.dtype])


def row_elements(shape: ModelShape, module: str, ranks: tuple[int, ...]) -> int:
    """Elements that one row takes before alignment: stacked A, then each transposed B."""
    a = sum(ranks) * shape.in_features(module)
    return a + sum(r * out for r, out in zip(ranks, shape.out_features(module), strict=True))


def make_layout(
    shape: ModelShape,
    dtype: Dtype,
    ranks: list[tuple[int, ...]],
    scales: list[tuple[float, ...]],
) -> SlabHeader:
    """Layout of a slab whose rows have the given per-slice ranks and scales (both layer-major)."""
    rows = []
    offset = 0
    for index, (row_ranks, row_scales) in enumerate(zip(ranks, scales, strict=True)):
        rows.append(LayoutRow(offset, row_ranks, row_scales))
        size = row_elements(shape, MODULES[index % len(MODULES)], row_ranks)
        offset += -(-size // ROW_ALIGN_ELEMENTS) * ROW_ALIGN_ELEMENTS
    largest = max((r for row in ranks for r in row), default=0)
    return SlabHeader(dtype=dtype, shape=shape, rank=largest, elements=offset, rows=tuple(rows))


def make_uniform_layout(shape: ModelShape, dtype: Dtype, rank: int, scale: float = 1.0) -> SlabHeader:
    """Layout of a slab with the same rank and scale in every projection."""
    slices = [len(SLICES[module]) for _ in range(shape.layers) for module in MODULES]
    return make_layout(shape, dtype, [(rank,) * n for n in slices], [(scale,) * n for n in slices])


def seal_layout(layout: SlabHeader, slab: bytes | bytearray | memoryview) -> SlabHeader:
    """The header of ``slab``: its layout with the digest of each layer. Raises ValueError where it has another size."""
    if len(slab) != layout.slab_bytes:
        raise ValueError(f"slab of {len(slab)} bytes, its layout says {layout.slab_bytes}")
    view = memoryview(slab)
    layers = [layout.layer(layer) for layer in range(layout.shape.layers)]
    digests = tuple(blake3(view[part.start : part.stop]).digest() for part in layers)
    return msgspec.structs.replace(layout, layer_digests=digests)


def encode_header(header: SlabHeader) -> bytes:
    """Canonical MessagePack bytes: equal headers give equal bytes, so they may be hashed.

    Raises ValueError on a layout: its bytes would say nothing of the slab's.
    """
    if not header.sealed:
        raise ValueError(f"{len(header.layer_digests)} digests for {header.shape.layers} layers; seal the layout first")
    return msgspec.msgpack.encode(header, order="deterministic")


def decode_header(data: bytes) -> SlabHeader:
    """Inverse of ``encode_header``. Raises msgspec.DecodeError on what it never gives.

    Rows that lie otherwise than ``lay_out`` lays them would leave bytes that no layer's digest is of.
    """
    try:
        header = msgspec.msgpack.decode(data, type=SlabHeader, strict=True)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(f"MessagePack data is malformed: {error}") from error
    if header.format != SLAB_FORMAT:
        raise msgspec.ValidationError(f"its format is {header.format}, this version reads {SLAB_FORMAT}")
    if not header.sealed:
        raise msgspec.ValidationError(f"{len(header.layer_digests)} digests for {header.shape.layers} layers")
    if not _as_laid_out(header):
        raise msgspec.ValidationError("its rows do not lie as its ranks and shape put them")
    if encode_header(header) != data:
        raise msgspec.ValidationError("its bytes are not canonical")
    return header


def _as_laid_out(header: SlabHeader) -> bool:
    if len(header.rows) != header.shape.layers * len(MODULES):
        return False
    ranks = [row.ranks for row in header.rows]
    if any(len(r) != len(SLICES[MODULES[i % len(MODULES)]]) or min(r) < 0 for i, r in enumerate(ranks)):
        return False
    layout = make_layout(header.shape, header.dtype, ranks, [row.scales for row in header.rows])
    return msgspec.structs.replace(layout, layer_digests=header.layer_digests) == header


def slab_version(header: SlabHeader) -> str:
    """The adapter's version: hex SHA-256 over the canonical header, whose digests stand for the slab's bytes."""
    return hashlib.sha256(encode_header(header)).hexdigest()
