"""Which layers are whole as bytes come, and which of them are not what they should be."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.adapter.dtypes import storage
from loraserve.adapter.format import lay_out
from loraserve.adapter.pack import Slab, sealed
from loraserve.engine.layers import Arrivals, damaged_layer
from loraserve.engine.pool_memory import HostPool
from loraserve.model_shape import MODULES, SLICES, ModelShape

SHAPE = ModelShape(layers=4, hidden=8, heads=2, kv_heads=1, head_dim=4, ffn=12, vocab=64)
OFFSET = 48


def make_slab(ranks: tuple[int, ...]) -> Slab:
    """``ranks`` are of the layers, in all their projections."""
    rows = [(rank,) * len(SLICES[module]) for rank in ranks for module in MODULES]
    layout = lay_out(SHAPE, "float32", rows, [(1.0,) * len(row) for row in rows])
    return sealed(layout, np.arange(layout.elements).astype(storage("float32")))


@given(
    ranks=st.tuples(*[st.integers(0, 3)] * SHAPE.layers),
    cuts=st.lists(st.floats(0, 1), max_size=12),
)
def test_each_layer_is_told_once_in_order_and_as_soon_as_it_is_whole(ranks: tuple[int, ...], cuts: list[float]) -> None:
    header = make_slab(ranks).header
    arrivals = Arrivals(header)
    told: list[int] = []
    for there in [*sorted(int(cut * header.slab_bytes) for cut in cuts), header.slab_bytes]:
        told += arrivals.upto(there)
        assert told == [layer for layer in range(SHAPE.layers) if header.layer(layer).stop <= there]
    assert told == list(range(SHAPE.layers))


@pytest.mark.parametrize("damaged", range(SHAPE.layers))
def test_the_first_damaged_layer_of_those_asked_for_is_named(damaged: int) -> None:
    slab = make_slab((1, 2, 1, 3))
    memory = bytearray(OFFSET + slab.header.slab_bytes)
    pool = HostPool(memoryview(memory))
    pool.write(OFFSET, slab.data)
    assert damaged_layer(pool, slab.header, OFFSET, range(SHAPE.layers)) is None
    for layer in {damaged, SHAPE.layers - 1}:
        memory[OFFSET + slab.header.layer(layer).stop - 1] ^= 1
    assert damaged_layer(pool, slab.header, OFFSET, range(SHAPE.layers)) == damaged
    assert damaged_layer(pool, slab.header, OFFSET, [damaged]) == damaged
    assert damaged_layer(pool, slab.header, OFFSET, range(damaged)) is None
