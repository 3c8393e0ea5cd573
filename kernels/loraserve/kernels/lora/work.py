"""The GPU's form of a step's batch: buffers of a fixed capacity that two launches fill, whatever the batch."""

import torch
import triton

from loraserve.kernels.lora.tables import LAYOUT_FIELDS, SLICES_MAX, AdapterTables
from loraserve.kernels.lora.tuning import TOKEN_BUCKETS, Blocks, pick
from loraserve.kernels.lora.work_kernels import list_work, sort_tokens
from loraserve.model_shape import MODULES

SORT_BLOCK, TILE_BLOCK = 256, 16
"""Tokens and tiles that a program looks at together."""


def device_name(device: torch.device) -> str:
    """What tables of tuned sizes call the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


def pick_blocks(tables: AdapterTables, tokens: int, max_rank: int) -> tuple[Blocks, ...]:
    """Block sizes of each module for steps of ``tokens`` tokens."""
    gpu = device_name(tables.base.device)
    return tuple(
        pick(gpu, k, widths, tokens, max_rank)
        for k, widths in zip(tables.in_features, tables.out_features, strict=True)
    )


TILE_ROWS = 128
"""Every tile of A has a number of rows that divides it."""


class Workspace:
    """Scratch memory that the launches of one stream share: nothing in it outlives a call of ``add_lora``.

    ``planes`` float32 holds partial sums of K's parts, [tokens, 3 * max_rank] each, the width rounded up to whole
    tiles; ``hidden``, in the pool's dtype, two [tokens, 3 * max_rank] for the rank-space intermediate. ``parts``,
    ``ready`` and ``turnstile`` int32 are zero between launches.
    """

    def __init__(
        self,
        tables: AdapterTables,
        tokens: int,
        max_rank: int,
        dtype: torch.dtype,
        blocks: tuple[Blocks, ...] | None = None,
    ) -> None:
        """For steps of up to ``tokens`` tokens and adapters of up to ``max_rank``, in ``blocks`` if given."""
        device = tables.base.device
        self.tokens = tokens
        # Slices begin at multiples of 16 columns, whatever the largest rank is: h is read 128 bits at a time.
        self.max_rank = -(-max_rank // 16) * 16
        width = SLICES_MAX * self.max_rank
        sizes = sorted({min(limit, tokens) for limit in TOKEN_BUCKETS})
        steps = [(size, b) for size in sizes for b in blocks or pick_blocks(tables, size, self.max_rank)]
        groups = max(most_groups(size, len(tables.base), b) for size, b in steps)
        tiles = max(most_groups(size, len(tables.base), b) * -(-width // b.br) for size, b in steps)
        self.plane_width = -(-width // TILE_ROWS) * TILE_ROWS
        rows = max(size * b.split for size, b in steps)
        self.planes = torch.empty(rows * self.plane_width, dtype=torch.float32, device=device)
        self.hidden = torch.empty(2 * tokens * width, dtype=dtype, device=device)
        self.parts = torch.zeros(tiles, dtype=torch.int32, device=device)
        self.ready = torch.zeros(triton.next_power_of_2(groups), dtype=torch.int32, device=device)
        self.turnstile = torch.zeros(2, dtype=torch.int32, device=device)


def most_groups(tokens: int, slots: int, blocks: Blocks) -> int:
    """Groups that any batch of ``tokens`` tokens may fall into: an unfinished one for each adapter, and full ones."""
    return min(tokens, slots) + tokens // blocks.bm


class LoraWork:
    """Who uses which adapter in a step of up to ``tokens`` tokens, and what each (layer, module) has to do about it.

    Buffers keep their addresses, and ``plan`` neither reads anything back nor launches more for a larger batch: a graph
    captured over one batch computes every other. One step at a time.
    """

    def __init__(
        self, tables: AdapterTables, workspace: Workspace, tokens: int, blocks: tuple[Blocks, ...] | None = None
    ) -> None:
        """``blocks``, one a module, stand in for the tuned ones. Raises ValueError where they exceed ``workspace``."""
        self.tables = tables
        self.workspace = workspace
        self.tokens = self.used = tokens
        self.blocks = blocks or pick_blocks(tables, tokens, workspace.max_rank)
        slots, rows, device = len(tables.base), tables.shape.layers * len(MODULES), tables.base.device
        self.groups = max(most_groups(tokens, slots, b) for b in self.blocks)
        tiles = max(self._most_tiles(module) for module in range(len(MODULES)))
        self._check_room(tiles)
        tiles += tiles % 2

        def buffer(*size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(*size, dtype=dtype, device=device)

        self.perm = buffer(tokens)
        self.count = buffer(slots)
        # Rows begin at multiples of 16 bytes: a kernel is compiled once for all of them.
        self.lengths = buffer(rows, 4)
        self.tile_a = buffer(rows, tiles, dtype=torch.int64)
        self.tile_place = buffer(rows, tiles, 8)
        self.group_b = buffer(rows, self.groups, 4, dtype=torch.int64)
        self.group_place = buffer(rows, self.groups, 8)
        self.group_scale = buffer(rows, self.groups, 4, dtype=torch.float32)

    def plan(self, slot_of_token: torch.Tensor) -> None:
        """``slot_of_token`` int32 [up to ``tokens``] on the device, negative for a token without an adapter.

        As many tokens are in the operands of the step.
        """
        self.used = len(slot_of_token)
        assert self.used <= self.tokens, (self.used, self.tokens)
        assert slot_of_token.dtype == torch.int32, slot_of_token.dtype
        if self.used == 0:
            return
        tables = self.tables
        slots, rows = len(tables.base), self.lengths.shape[0]
        sort_tokens[(slots,)](slot_of_token, tables.turn, self.count, self.perm, self.used, BLOCK=SORT_BLOCK)
        list_work[(rows,)](
            self.count,
            tables.order,
            tables.base,
            tables.layout,
            tables.scales,
            self.lengths,
            self.tile_a,
            self.tile_place,
            self.group_b,
            self.group_place,
            self.group_scale,
            slots,
            triton.next_power_of_2(slots),
            rows,
            self.tile_a.shape[1],
            self.groups,
            *tables.in_features,
            *(b.bm for b in self.blocks),
            *(b.br for b in self.blocks),
            TILE_BLOCK,
        )

    def _most_tiles(self, module: int) -> int:
        b = self.blocks[module]
        rank = len(self.tables.out_features[module]) * self.workspace.max_rank
        return most_groups(self.tokens, len(self.tables.base), b) * -(-rank // b.br)

    def _check_room(self, tiles: int) -> None:
        space = self.workspace
        rows = self.tokens * max(b.split for b in self.blocks)
        planes = rows * space.plane_width
        assert all(TILE_ROWS % b.br == 0 for b in self.blocks), "a tile would reach into the next token's plane"
        if (
            self.tokens > space.tokens
            or planes > space.planes.numel()
            or tiles > len(space.parts)
            or self.groups > len(space.ready)
        ):
            raise ValueError(f"{self.tokens} tokens in blocks of {self.blocks} exceed a workspace for {space.tokens}")


assert LAYOUT_FIELDS == 8, "work_kernels.py reads rows of eight fields"
