"""Which layers are verified as bytes arrive, and how a damaged layer is found."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.adapter.dtypes import storage_dtype
from loraserve.adapter.format import make_layout
from loraserve.adapter.pack import Slab, seal_slab
from loraserve.engine.loading.memory import HostPool, LayersToVerify, find_damaged_layer, split_layers
from loraserve.model_shape import MODULES, SLICES, ModelShape

SHAPE = ModelShape(layers=4, hidden=8, heads=2, kv_heads=1, head_dim=4, ffn=12, vocab=64)
OFFSET = 48


def make_slab(ranks: tuple[int, ...]) -> Slab:
    """Return a slab whose layers have these ranks in all projections."""
    rows = [(rank,) * len(SLICES[module]) for rank in ranks for module in MODULES]
    layout = make_layout(SHAPE, "float32", rows, [(1.0,) * len(row) for row in rows])
    return seal_slab(layout, np.arange(layout.elements).astype(storage_dtype("float32")))


@given(
    ranks=st.tuples(*[st.integers(0, 3)] * SHAPE.layers),
    cuts=st.lists(st.floats(0, 1), max_size=12),
)
def test_each_layer_is_verified_once_in_order_when_complete(ranks: tuple[int, ...], cuts: list[float]) -> None:
    header = make_slab(ranks).header
    for on_device in (True, False):
        arrivals = LayersToVerify(header, on_device)
        told: list[int] = []
        for there in [*sorted(int(cut * header.slab_bytes) for cut in cuts), header.slab_bytes]:
            told += arrivals.take(there)
            whole = [layer for layer in range(SHAPE.layers) if header.layer(layer).stop <= there]
            assert told == (whole if on_device or there == header.slab_bytes else [])
        assert told == list(range(SHAPE.layers))


@given(first=st.integers(0, 50), count=st.integers(0, 50), threads=st.integers(1, 10))
def test_layers_are_split_in_order_and_evenly(first: int, count: int, threads: int) -> None:
    layers = range(first, first + count)
    pieces = split_layers(layers, threads)
    assert [layer for piece in pieces for layer in piece] == list(layers)
    assert len(pieces) <= threads
    assert all(0 < len(piece) <= -(-count // threads) for piece in pieces)


@pytest.mark.parametrize("damaged", range(SHAPE.layers))
def test_the_first_damaged_layer_of_those_asked_for_is_named(damaged: int) -> None:
    slab = make_slab((1, 2, 1, 3))
    memory = bytearray(OFFSET + slab.header.slab_bytes)
    pool = HostPool(memoryview(memory))
    pool.write(OFFSET, slab.data)
    assert find_damaged_layer(pool, slab.header, OFFSET, range(SHAPE.layers)) is None
    for layer in {damaged, SHAPE.layers - 1}:
        memory[OFFSET + slab.header.layer(layer).stop - 1] ^= 1
    assert find_damaged_layer(pool, slab.header, OFFSET, range(SHAPE.layers)) == damaged
    assert find_damaged_layer(pool, slab.header, OFFSET, [damaged]) == damaged
    assert find_damaged_layer(pool, slab.header, OFFSET, range(damaged)) is None
