"""Unpacks slabs, so that tests can compare their matrices with the matrices of the adapter."""

import numpy as np
from numpy.typing import NDArray

from loraserve.adapter.dtypes import storage_dtype, to_float32
from loraserve.adapter.format import SlabHeader
from loraserve.adapter.pack import row_views
from loraserve.model_shape import MODULES, SLICES

Matrices = tuple[NDArray[np.float32], NDArray[np.float32], float]
"""A ``[rank, in]``, B ``[out, rank]`` and the scale of the product B A."""


def unpack_slab(header: SlabHeader, data: bytes | bytearray | memoryview) -> dict[tuple[int, str], Matrices]:
    """Return a dict from (layer, projection) to the float32 matrices of every projection in a slab."""
    elements = np.frombuffer(data, dtype=storage_dtype(header.dtype))
    if len(elements) != header.elements:
        raise ValueError(f"slab of {len(elements)} elements, its header says {header.elements}")
    unpacked: dict[tuple[int, str], Matrices] = {}
    for index, row in enumerate(header.rows):
        layer, module = index // len(MODULES), MODULES[index % len(MODULES)]
        a_rows, b_blocks = row_views(elements, row, module, header.shape)
        for name, a, b, scale in zip(SLICES[module], a_rows, b_blocks, row.scales, strict=True):
            if len(a):
                unpacked[layer, name] = (to_float32(a, header.dtype), to_float32(b.T, header.dtype), scale)
    return unpacked
