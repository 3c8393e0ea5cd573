"""The slab header: layer digests, the version, and the refusal of invalid headers."""

import hashlib
from typing import Any

import msgspec
import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from loraserve.adapter.dtypes import storage_dtype
from loraserve.adapter.format import (
    ITEM_BYTES,
    SLAB_FORMAT,
    LayoutRow,
    SlabHeader,
    decode_header,
    encode_header,
    make_layout,
    make_uniform_layout,
    seal_layout,
    slab_version,
)
from loraserve.adapter.pack import Slab, seal_slab
from loraserve.model_shape import MODULES, SLICES, ModelShape

SHAPE = ModelShape(layers=3, hidden=16, heads=4, kv_heads=2, head_dim=4, ffn=24, vocab=64)


@st.composite
def slabs(draw: st.DrawFn) -> Slab:
    """Draw slabs of arbitrary ranks. Projections, modules and whole layers may be absent."""
    counts = [len(SLICES[module]) for _ in range(SHAPE.layers) for module in MODULES]
    ranks = [tuple(draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))) for n in counts]
    dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
    layout = make_layout(SHAPE, dtype, ranks, [(0.5,) * n for n in counts])  # type: ignore[arg-type]
    values = np.random.default_rng(draw(st.integers(0, 9))).integers(0, 99, layout.elements)
    return seal_slab(layout, values.astype(storage_dtype(layout.dtype)))


@pytest.fixture
def header() -> SlabHeader:
    layout = make_uniform_layout(SHAPE, "float32", 2)
    return seal_layout(layout, bytes(layout.slab_bytes))


@given(slab=slabs())
def test_every_byte_belongs_to_one_layer_and_its_digest(slab: Slab) -> None:
    layers = [slab.header.layer(layer) for layer in range(SHAPE.layers)]
    assert [byte for part in layers for byte in part] == list(range(slab.header.slab_bytes))
    expected = tuple(blake3(slab.data[part.start : part.stop]).digest() for part in layers)
    assert slab.header.layer_digests == expected
    for layer, part in enumerate(layers):
        offsets = [slab.header.row(layer, m).offset * ITEM_BYTES[slab.header.dtype] for m in range(len(MODULES))]
        assert part.start == offsets[0]
        assert max(offsets) <= part.stop


@given(slab=slabs(), at=st.integers(0), bit=st.integers(0, 7))
def test_a_flipped_bit_changes_the_digest_of_its_own_layer_and_the_version(slab: Slab, at: int, bit: int) -> None:
    if not slab.header.slab_bytes:
        return
    data = bytearray(slab.data)
    at %= len(data)
    data[at] ^= 1 << bit
    other = seal_layout(slab.header, data)
    changed = [a != b for a, b in zip(slab.header.layer_digests, other.layer_digests, strict=True)]
    assert changed == [at in slab.header.layer(layer) for layer in range(SHAPE.layers)]
    assert slab_version(other) != slab.version


@given(slab=slabs())
def test_a_header_round_trips_and_its_version_is_the_hash_of_its_bytes(slab: Slab) -> None:
    data = encode_header(slab.header)
    assert decode_header(data) == slab.header
    assert slab_version(slab.header) == slab.version == hashlib.sha256(data).hexdigest()


@given(slab=slabs(), at=st.integers(0), bit=st.integers(0, 7))
def test_a_header_with_a_flipped_bit_is_refused_or_has_another_version(slab: Slab, at: int, bit: int) -> None:
    data = bytearray(encode_header(slab.header))
    data[at % len(data)] ^= 1 << bit
    try:
        other = decode_header(bytes(data))
    except msgspec.DecodeError:
        return
    assert slab_version(other) == hashlib.sha256(data).hexdigest() != slab.version


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float16"},
        {"layer_digests": (bytes(32),) * 3},
        {"shape": msgspec.structs.replace(SHAPE, vocab=65)},
        {"rows": tuple(LayoutRow(0, (1,), (scale,)) for scale in (0.5, 0.25))},
        {"rank": 3},
        {"elements": 1},
        {"format": SLAB_FORMAT + 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_version_depends_on_every_field(header: SlabHeader, change: dict[str, Any]) -> None:
    assert slab_version(msgspec.structs.replace(header, **change)) != slab_version(header)


def test_an_unsealed_layout_cannot_be_encoded(header: SlabHeader) -> None:
    layout = make_uniform_layout(SHAPE, "float32", 2)
    assert not layout.sealed
    assert header.sealed
    for refused in (encode_header, slab_version):
        with pytest.raises(ValueError, match="0 digests for 3 layers; seal the layout first"):
            refused(layout)
    with pytest.raises(ValueError, match=rf"slab of 5 bytes, its layout says {layout.slab_bytes}"):
        seal_layout(layout, bytes(5))


def moved(header: SlabHeader, by: int) -> tuple[LayoutRow, ...]:
    """Return the rows of ``header`` with the offset of the second row changed by ``by``."""
    first, second, *rest = header.rows
    return (first, msgspec.structs.replace(second, offset=second.offset + by), *rest)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda h: {"format": 1}, "its format is 1, this version reads 3"),
        (lambda h: {"layer_digests": ()}, "0 digests for 3 layers"),
        (lambda h: {"layer_digests": h.layer_digests[:2]}, "2 digests for 3 layers"),
        (lambda h: {"layer_digests": (*h.layer_digests, bytes(32))}, "4 digests for 3 layers"),
        (lambda h: {"layer_digests": (*h.layer_digests[:2], bytes(31))}, "length >= 32"),
        (lambda h: {"rows": h.rows[:-1]}, "its rows are not at the offsets that follow from its ranks and shape"),
        (lambda h: {"rows": moved(h, 16)}, "its rows are not at the offsets"),
        (lambda h: {"rows": moved(h, -16)}, "its rows are not at the offsets"),
        (lambda h: {"rows": (LayoutRow(0, (2, 2), (1.0, 1.0)), *h.rows[1:])}, "its rows are not at the offsets"),
        (lambda h: {"rows": (LayoutRow(0, (-2, 2, 2), (1.0,) * 3), *h.rows[1:])}, "its rows are not at the offsets"),
        (lambda h: {"elements": h.elements + 16}, "its rows are not at the offsets"),
        (lambda h: {"rank": 1}, "its rows are not at the offsets"),
    ],
)
def test_inconsistent_headers_are_refused(header: SlabHeader, change: Any, reason: str) -> None:
    tampered = msgspec.structs.replace(header, **change(header))
    with pytest.raises(msgspec.ValidationError, match=reason):
        decode_header(msgspec.msgpack.encode(tampered, order="deterministic"))


def test_only_the_canonical_encoding_is_accepted(header: SlabHeader) -> None:
    fields = msgspec.structs.asdict(header)
    assert decode_header(msgspec.msgpack.encode(fields)) == header
    for other in ({**fields, "more": 1}, {name: fields[name] for name in fields if name != "format"}):
        with pytest.raises(msgspec.ValidationError, match="its bytes are not canonical"):
            decode_header(msgspec.msgpack.encode(other))


def test_malformed_messagepack_is_refused(header: SlabHeader) -> None:
    no_text = encode_header(header).replace(b"float32", b"\xa5loat32")
    too_deep = b"\x81" + msgspec.msgpack.encode("more") + b"\x91" * 100_000
    for data in (no_text, too_deep):
        with pytest.raises(msgspec.DecodeError, match="MessagePack data is malformed"):
            decode_header(data)


def test_a_header_of_the_first_format_is_refused(header: SlabHeader) -> None:
    fields = {name: value for name, value in msgspec.structs.asdict(header).items() if name != "layer_digests"}
    with pytest.raises(msgspec.ValidationError, match="its format is 1, this version reads 3"):
        decode_header(msgspec.msgpack.encode({**fields, "format": 1}))
