"""Device tables, indexed by adapter slot, from which the kernels read the locations of adapter weights."""

import torch

from loraserve.adapter.format import SlabHeader, row_elements
from loraserve.model_shape import MODULES, ModelShape

MAX_SLICES = 3
"""Maximum number of slices of a module. The qkv module has three: q, k and v."""

# Fields of a row of ``AdapterTables.layout``, in elements. A slab holds a module's A, then the B of each slice.
A_OFFSET = 0
A_ROWS = 1
RANKS = 2  # one per slice
B_OFFSETS = RANKS + MAX_SLICES  # one per slice; B is stored transposed
LAYOUT_FIELDS = B_OFFSETS + MAX_SLICES


class AdapterTables:
    """Weight locations, ranks and scales of up to ``slots`` adapters. The 4 modules are qkv, o, gate_up and down.

    ``layout`` int64 [slots, layers, 4, LAYOUT_FIELDS] has ranks, and element offsets from the slab's start. ``base``
    int64 [slots] is the slab's first element in the pool. ``scales`` is float32 [slots, layers, 4, MAX_SLICES].
    ``elements`` int64 [slots, layers, 4] counts weights. ``widths`` int64 [4, MAX_SLICES] is the output width of each
    slice. ``order`` int32 [slots] lists slots by descending rank, so that the GPU starts the largest adapters first.
    ``turn`` int32 [slots] is each slot's index in ``order``. Free slots have rank 0, so they add nothing.
    """

    def __init__(self, shape: ModelShape, slots: int, device: str = "cpu") -> None:
        self.shape = shape
        self.layout = torch.zeros(slots, shape.layers, len(MODULES), LAYOUT_FIELDS, dtype=torch.int64, device=device)
        self.scales = torch.zeros(slots, shape.layers, len(MODULES), MAX_SLICES, dtype=torch.float32, device=device)
        self.base = torch.zeros(slots, dtype=torch.int64, device=device)
        self.elements = torch.zeros(slots, shape.layers, len(MODULES), dtype=torch.int64)
        self.order = torch.arange(slots, dtype=torch.int32, device=device)
        self.turn = torch.arange(slots, dtype=torch.int32, device=device)
        self._ranks = [0] * slots
        self.widths = torch.zeros(len(MODULES), MAX_SLICES, dtype=torch.int64, device=device)
        for index, module in enumerate(MODULES):
            self.widths[index, : len(shape.out_features(module))] = torch.tensor(shape.out_features(module))
        self.in_features = tuple(shape.in_features(module) for module in MODULES)
        self.out_features = tuple(shape.out_features(module) for module in MODULES)

    def install(self, slot: int, header: SlabHeader, base_elements: int) -> None:
        """Assign to ``slot`` the adapter whose slab starts at element ``base_elements`` of the pool.

        Raises ValueError if the slab was packed for another model shape.
        """
        if header.shape != self.shape:
            raise ValueError(f"slab is for {header.shape}, this model is {self.shape}; register the adapter again")
        layout, scales, elements = [], [], []
        for layer in range(self.shape.layers):
            for module, name in enumerate(MODULES):
                row = header.row(layer, module)
                layout.append(self._layout_row(header, layer, module))
                scales.append(list(row.scales) + [0.0] * (MAX_SLICES - len(row.scales)))
                elements.append(row_elements(self.shape, name, row.ranks))
        _copy_in_stream_order(self.layout[slot], torch.tensor(layout))
        _copy_in_stream_order(self.scales[slot], torch.tensor(scales))
        self.elements[slot].copy_(torch.tensor(elements).view_as(self.elements[slot]))
        _copy_in_stream_order(self.base[slot], torch.tensor(base_elements))
        self._set_rank(slot, header.rank)

    def remove(self, slot: int) -> None:
        self.layout[slot].zero_()
        self.scales[slot].zero_()
        self.base[slot].zero_()
        self.elements[slot] = 0
        self._set_rank(slot, 0)

    def validate(self) -> None:
        """Assert that ranks add up to the rows of A, no field is negative, and ``turn`` is the inverse of ``order``."""
        assert bool((self.layout >= 0).all()), "negative offset or rank"
        assert bool((self.base >= 0).all()), "negative base"
        ranks = self.layout[..., RANKS : RANKS + MAX_SLICES]
        assert torch.equal(ranks.sum(-1), self.layout[..., A_ROWS]), "ranks do not sum to the rows of A"
        slots = torch.arange(len(self._ranks), dtype=torch.int32, device=self.turn.device)
        assert torch.equal(self.turn[self.order.long()], slots), "turn is not the inverse of order"

    def _set_rank(self, slot: int, rank: int) -> None:
        self._ranks[slot] = rank
        order = torch.tensor(sorted(range(len(self._ranks)), key=lambda s: -self._ranks[s]), dtype=torch.int32)
        _copy_in_stream_order(self.order, order)
        _copy_in_stream_order(self.turn, torch.argsort(order).to(torch.int32))

    def _layout_row(self, header: SlabHeader, layer: int, module: int) -> list[int]:
        row = header.row(layer, module)
        fields = [0] * LAYOUT_FIELDS
        fields[A_OFFSET] = row.offset
        fields[A_ROWS] = row.total_rank
        offset = row.offset + row.total_rank * self.in_features[module]
        for index, (rank, width) in enumerate(zip(row.ranks, self.out_features[module], strict=True)):
            fields[RANKS + index] = rank
            fields[B_OFFSETS + index] = offset
            offset += rank * width
        return fields


def _copy_in_stream_order(target: torch.Tensor, values: torch.Tensor) -> None:
    """Copy to the device without waiting. Steps that are already launched still read the old values."""
    values = values.view_as(target)
    target.copy_(values.pin_memory() if target.is_cuda else values, non_blocking=True)
