"""The slab format. A slab is an adapter packed into one contiguous array. Its size is linear in the adapter's rank.

A slab has one *row* per layer and fused module, ordered by layer, then module. A *slice* is one projection of a module.
Slice i of a row has rank ``r_i``, which is 0 if the adapter does not change it. A row contains the A matrices of its
slices, stacked as ``[sum of r_i, in]``, then the transposed B of each slice, ``[r_i, out_i]``. For a token x the
adapter adds ``scale_i * (x @ A_i.T) @ B_i.T`` to slice i of the module's output.

The header contains a digest of each layer. The header's own digest is the adapter's version. A reader verifies the
header first. Any thread can then verify a layer as soon as it has arrived. The layer digests use BLAKE3
(https://github.com/BLAKE3-team/BLAKE3-specs), because every load computes them. A thread hashes 5.3 GiB/s with BLAKE3
and 1.1 GiB/s with SHA-256 on an Intel Xeon with AVX-512 and SHA instructions.
"""

import hashlib
from typing import Annotated, Literal

import msgspec
from blake3 import blake3

from loraserve.model_shape import MODULES, SLICES, ModelShape

SLAB_FORMAT = 3
ROW_ALIGN_ELEMENTS = 16
"""Rows start at multiples of this number, so that kernels can use 128-bit loads with every dtype."""

Dtype = Literal["float32", "bfloat16", "float16"]
Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
ITEM_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


class LayoutRow(msgspec.Struct, frozen=True, array_like=True):
    """The row of one (layer, module): its offset in elements, and the rank and scale of each slice (projection).

    Rank 0 means that the adapter does not change the projection.
    """

    offset: int
    ranks: tuple[int, ...]
    scales: tuple[float, ...]

    @property
    def total_rank(self) -> int:
        """Return the sum of the slices' ranks: the number of rows of their stacked A matrices."""
        return sum(self.ranks)


class SlabHeader(msgspec.Struct, frozen=True):
    """Describes a slab (a packed adapter). ``rows`` is ordered by layer, then module (as in ``MODULES``).

    ``layer_digests`` are the BLAKE3 digests of the layers. They are empty until ``seal_layout`` computes them.
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
        """Return the byte range of a layer in the slab. Layers are contiguous and cover the whole slab."""
        last = layer + 1 == self.shape.layers
        end = self.elements if last else self.row(layer + 1, 0).offset
        return range(self.row(layer, 0).offset * ITEM_BYTES[self.dtype], end * ITEM_BYTES[self.dtype])


def row_elements(shape: ModelShape, module: str, ranks: tuple[int, ...]) -> int:
    """Return the number of elements in a module's row, without alignment padding."""
    a = sum(ranks) * shape.in_features(module)
    return a + sum(r * out for r, out in zip(ranks, shape.out_features(module), strict=True))


def make_layout(
    shape: ModelShape,
    dtype: Dtype,
    ranks: list[tuple[int, ...]],
    scales: list[tuple[float, ...]],
) -> SlabHeader:
    """Return a header without layer digests. ``ranks`` and ``scales`` have one tuple per row with a value per slice."""
    rows = []
    offset = 0
    for index, (row_ranks, row_scales) in enumerate(zip(ranks, scales, strict=True)):
        rows.append(LayoutRow(offset, row_ranks, row_scales))
        size = row_elements(shape, MODULES[index % len(MODULES)], row_ranks)
        offset += -(-size // ROW_ALIGN_ELEMENTS) * ROW_ALIGN_ELEMENTS
    largest = max((r for row in ranks for r in row), default=0)
    return SlabHeader(dtype=dtype, shape=shape, rank=largest, elements=offset, rows=tuple(rows))


def make_uniform_layout(shape: ModelShape, dtype: Dtype, rank: int, scale: float = 1.0) -> SlabHeader:
    """Return a header, without layer digests, for an adapter with one rank and scale in all projections."""
    slices = [len(SLICES[module]) for _ in range(shape.layers) for module in MODULES]
    return make_layout(shape, dtype, [(rank,) * n for n in slices], [(scale,) * n for n in slices])


def seal_layout(layout: SlabHeader, slab: bytes | bytearray | memoryview) -> SlabHeader:
    """Return ``layout`` with the digests of the layers in ``slab``. Raises ValueError if the slab's size is wrong."""
    if len(slab) != layout.slab_bytes:
        raise ValueError(f"slab of {len(slab)} bytes, its layout says {layout.slab_bytes}")
    view = memoryview(slab)
    layers = [layout.layer(layer) for layer in range(layout.shape.layers)]
    digests = tuple(blake3(view[part.start : part.stop]).digest() for part in layers)
    return msgspec.structs.replace(layout, layer_digests=digests)


def encode_header(header: SlabHeader) -> bytes:
    """Encode a header as canonical MessagePack: equal headers give equal bytes, so their hash identifies the header.

    Raises ValueError for a header without layer digests, because it does not identify the slab's bytes.
    """
    if not header.sealed:
        raise ValueError(f"{len(header.layer_digests)} digests for {header.shape.layers} layers; seal the layout first")
    return msgspec.msgpack.encode(header, order="deterministic")


def decode_header(data: bytes) -> SlabHeader:
    """Decode the bytes that ``encode_header`` returned. Raises msgspec.DecodeError for other bytes.

    Row offsets must be those of ``make_layout``. With other offsets, the digests might not cover all bytes.
    """
    try:
        header = msgspec.msgpack.decode(data, type=SlabHeader, strict=True)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(f"MessagePack data is malformed: {error}") from error
    if header.format != SLAB_FORMAT:
        raise msgspec.ValidationError(f"its format is {header.format}, this version reads {SLAB_FORMAT}")
    if not header.sealed:
        raise msgspec.ValidationError(f"{len(header.layer_digests)} digests for {header.shape.layers} layers")
    if not _has_canonical_layout(header):
        raise msgspec.ValidationError("its rows are not at the offsets that follow from its ranks and shape")
    if encode_header(header) != data:
        raise msgspec.ValidationError("its bytes are not canonical")
    return header


def _has_canonical_layout(header: SlabHeader) -> bool:
    if len(header.rows) != header.shape.layers * len(MODULES):
        return False
    ranks = [row.ranks for row in header.rows]
    if any(len(r) != len(SLICES[MODULES[i % len(MODULES)]]) or min(r) < 0 for i, r in enumerate(ranks)):
        return False
    layout = make_layout(header.shape, header.dtype, ranks, [row.scales for row in header.rows])
    return msgspec.structs.replace(layout, layer_digests=header.layer_digests) == header


def slab_version(header: SlabHeader) -> str:
    """Return the adapter's version: the SHA-256 of the encoded header in hex. It depends on all layer digests."""
    return hashlib.sha256(encode_header(header)).hexdigest()
