"""Where each resident adapter lies: the state that the kernels read on the device, indexed by slot."""

import torch

from loraserve.adapter.format import SlabHeader, row_elements
from loraserve.model_shape import MODULES, ModelShape

SLICES_MAX = 3
LAYOUT_FIELDS = 8
"""(offset of A, rows of A, rank of each of three slices, offset of each slice's transposed B), in elements."""


class AdapterTables:
    """Layouts, scales and base offsets of up to ``slots`` adapters.

    ``layout`` int64 [slots, layers, 4, 8], offsets relative to the slab's start; ``scales`` float32 [slots, layers, 4,
    3]; ``base`` int64 [slots], element offset of the slab in the pool; ``elements`` int64 [slots, layers, 4], weights
    of each row; ``widths`` int64 [4, 3], output width of each slice; ``order`` int32 [slots], slots by falling rank,
    and ``turn`` int32 [slots], the place of each in it: what takes long is begun first. A free slot has rank 0
    everywhere, so that computing with it changes nothing.
    """

    def __init__(self, shape: ModelShape, slots: int, device: str = "cpu") -> None:
        self.shape = shape
        self.layout = torch.zeros(slots, shape.layers, len(MODULES), LAYOUT_FIELDS, dtype=torch.int64, device=device)
        self.scales = torch.zeros(slots, shape.layers, len(MODULES), SLICES_MAX, dtype=torch.float32, device=device)
        self.base = torch.zeros(slots, dtype=torch.int64, device=device)
        self.elements = torch.zeros(slots, shape.layers, len(MODULES), dtype=torch.int64)
        self.order = torch.arange(slots, dtype=torch.int32, device=device)
        self.turn = torch.arange(slots, dtype=torch.int32, device=device)
        self._ranks = [0] * slots
        self.widths = torch.zeros(len(MODULES), SLICES_MAX, dtype=torch.int64, device=device)
        for index, module in enumerate(MODULES):
            self.widths[index, : len(shape.out_features(module))] = torch.tensor(shape.out_features(module))
        self.in_features = tuple(shape.in_features(module) for module in MODULES)
        self.out_features = tuple(shape.out_features(module) for module in MODULES)

    def install(self, slot: int, header: SlabHeader, base_elements: int) -> None:
        """Make the slab at ``base_elements`` of the pool the adapter of this slot.

        Raises ValueError where the slab was packed for another model shape.
        """
        if header.shape != self.shape:
            raise ValueError(f"slab is for {header.shape}, this model is {self.shape}; register the adapter again")
        layout, scales, elements = [], [], []
        for layer in range(self.shape.layers):
            for module, name in enumerate(MODULES):
                row = header.row(layer, module)
                layout.append(self._fields(header, layer, module))
                scales.append(list(row.scales) + [0.0] * (SLICES_MAX - len(row.scales)))
                elements.append(row_elements(self.shape, name, row.ranks))
        _send(self.layout[slot], torch.tensor(layout))
        _send(self.scales[slot], torch.tensor(scales))
        self.elements[slot].copy_(torch.tensor(elements).view_as(self.elements[slot]))
        _send(self.base[slot], torch.tensor(base_elements))
        self._rank_slot(slot, header.rank)

    def remove(self, slot: int) -> None:
        """Free the slot."""
        self.layout[slot].zero_()
        self.scales[slot].zero_()
        self.base[slot].zero_()
        self.elements[slot] = 0
        self._rank_slot(slot, 0)

    def validate(self) -> None:
        """Ranks of a row sum to its rows of A; nothing is negative."""
        assert bool((self.layout >= 0).all()), "negative offset or rank"
        assert bool((self.base >= 0).all()), "negative base"
        assert torch.equal(self.layout[..., 2:5].sum(-1), self.layout[..., 1]), "ranks do not sum to the rows of A"
        slots = torch.arange(len(self._ranks), dtype=torch.int32, device=self.turn.device)
        assert torch.equal(self.turn[self.order.long()], slots), "a slot has no turn, or two"

    def _rank_slot(self, slot: int, rank: int) -> None:
        self._ranks[slot] = rank
        order = torch.tensor(sorted(range(len(self._ranks)), key=lambda s: -self._ranks[s]), dtype=torch.int32)
        _send(self.order, order)
        _send(self.turn, torch.argsort(order).to(torch.int32))

    def _fields(self, header: SlabHeader, layer: int, module: int) -> list[int]:
        row = header.row(layer, module)
        ranks = list(row.ranks) + [0] * (SLICES_MAX - len(row.ranks))
        offsets = []
        offset = row.offset + row.total_rank * self.in_features[module]
        for rank, width in zip(row.ranks, self.out_features[module], strict=True):
            offsets.append(offset)
            offset += rank * width
        return [row.offset, row.total_rank, *ranks, *offsets, *([0] * (SLICES_MAX - len(offsets)))]


def _send(target: torch.Tensor, values: torch.Tensor) -> None:
    """To the device without waiting: in the order of its stream, behind the steps that read the old ones."""
    values = values.view_as(target)
    target.copy_(values.pin_memory() if target.is_cuda else values, non_blocking=True)
