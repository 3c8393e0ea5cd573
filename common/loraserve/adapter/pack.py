"""Packs the adapter in a PEFT directory into one array (a slab) when it is registered."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loraserve.adapter.dtypes import Elements, all_finite, convert_elements, storage_dtype, to_float32
from loraserve.adapter.format import Dtype, LayoutRow, SlabHeader, make_layout, seal_layout, slab_version
from loraserve.adapter.peft import WEIGHTS_FILE, read_peft_config
from loraserve.adapter.tensor_file import TensorEntry, TensorFile
from loraserve.adapter.validate import LoraPair, check_directory, pair_matrices
from loraserve.errors import AdapterError
from loraserve.model_shape import MODULES, SLICES, ModelShape


@dataclass(frozen=True, slots=True)
class Slab:
    """A packed adapter: its header, its bytes and its version."""

    header: SlabHeader
    data: memoryview
    version: str


def pack_peft(directory: Path, shape: ModelShape, dtype: Dtype, max_rank: int) -> Slab:
    """Check the adapter in ``directory`` and pack it for a model of ``shape``.

    Needs memory for the result and a few copies of the largest tensor. Raises AdapterError if the directory or a tensor
    is invalid, with code ``not_finite`` for values that are not finite in ``dtype``.
    """
    check_directory(directory)
    config = read_peft_config(directory)
    with TensorFile(directory / WEIGHTS_FILE) as file:
        pairs = pair_matrices(config, file.entries, shape, max_rank)
        layout = _layout_of(pairs, shape, dtype)
        # Zeros make the alignment gaps, and so the digests, reproducible.
        elements = np.zeros(layout.elements, dtype=storage_dtype(dtype))
        for index, row in enumerate(layout.rows):
            layer, module = index // len(MODULES), MODULES[index % len(MODULES)]
            _fill_row(elements, row, module, [pairs.get((layer, name)) for name in SLICES[module]], file, layout)
    return seal_slab(layout, elements)


def seal_slab(layout: SlabHeader, elements: Elements) -> Slab:
    data = elements.view(np.uint8).data.toreadonly()
    header = seal_layout(layout, data)
    return Slab(header, data, slab_version(header))


def _layout_of(pairs: Mapping[tuple[int, str], LoraPair], shape: ModelShape, dtype: Dtype) -> SlabHeader:
    ranks: list[tuple[int, ...]] = []
    scales: list[tuple[float, ...]] = []
    for layer in range(shape.layers):
        for module in MODULES:
            present = [pairs.get((layer, name)) for name in SLICES[module]]
            ranks.append(tuple(pair.rank if pair else 0 for pair in present))
            scales.append(tuple(pair.scale if pair else 0.0 for pair in present))
    return make_layout(shape, dtype, ranks, scales)


def row_views(
    elements: Elements, row: LayoutRow, module: str, shape: ModelShape
) -> tuple[list[Elements], list[Elements]]:
    """Return views of each slice's A ``[rank, in]``, and of each slice's transposed B ``[rank, out]``, in ``row``."""
    width = shape.in_features(module)
    begin = row.offset + row.total_rank * width
    a = elements[row.offset : begin].reshape(row.total_rank, width)
    a_rows = np.split(a, np.cumsum(row.ranks)[:-1])
    b_blocks = []
    for rank, out in zip(row.ranks, shape.out_features(module), strict=True):
        b_blocks.append(elements[begin : begin + rank * out].reshape(rank, out))
        begin += rank * out
    return a_rows, b_blocks


def _fill_row(
    elements: Elements,
    row: LayoutRow,
    module: str,
    pairs: list[LoraPair | None],
    file: TensorFile,
    layout: SlabHeader,
) -> None:
    a_rows, b_blocks = row_views(elements, row, module, layout.shape)
    for pair, a, b in zip(pairs, a_rows, b_blocks, strict=True):
        if pair is not None:
            a[:] = _read_finite(file, pair.a, layout.dtype)
            b[:] = _read_finite(file, pair.b, layout.dtype).T


def _read_finite(file: TensorFile, entry: TensorEntry, dtype: Dtype) -> Elements:
    values = file.read(entry)
    if not all_finite(values, entry.dtype):
        raise AdapterError("not_finite", f"{entry.name} holds infinite values or NaN; train the adapter again")
    converted = convert_elements(values, entry.dtype, dtype)
    if not all_finite(converted, dtype):
        largest = float(np.abs(to_float32(values, entry.dtype)).max())
        raise AdapterError(
            "not_finite",
            f"{entry.name} holds {largest:g}, too large for {dtype}; set engine.slab_dtype to bfloat16 or float32",
        )
    return converted
