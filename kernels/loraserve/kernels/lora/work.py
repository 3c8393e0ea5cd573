"""Work lists of a step on the GPU: the token groups and the tiles of A that each (layer, module) computes.

An adapter's tokens are split into groups of at most ``bm`` tokens, and the rows of its A into tiles of ``br`` rows. Two
kernel launches per step write the lists to fixed buffers. The lengths of the lists also stay on the device. The
host reads nothing back, so one captured graph serves all batches of its size.
"""

import torch
import triton
import triton.language as tl

from loraserve.kernels.lora import tables as adapter_tables
from loraserve.kernels.lora.tables import AdapterTables
from loraserve.kernels.lora.tuning import TOKEN_BUCKETS, Blocks, pick
from loraserve.model_shape import MODULES

SORT_BLOCK, TILE_BLOCK = 256, 16
"""Number of tokens, and of tiles, that a program handles at once."""

# Fields of ``AdapterTables.layout`` as Triton constants.
MAX_SLICES = tl.constexpr(adapter_tables.MAX_SLICES)
A_OFFSET = tl.constexpr(adapter_tables.A_OFFSET)
A_ROWS = tl.constexpr(adapter_tables.A_ROWS)
RANKS = tl.constexpr(adapter_tables.RANKS)
B_OFFSETS = tl.constexpr(adapter_tables.B_OFFSETS)
LAYOUT_FIELDS = tl.constexpr(adapter_tables.LAYOUT_FIELDS)

# Layout of the work lists. All rows are aligned to 16 bytes, because Triton compiles once per pointer alignment.
# lengths, int32, one row per (layer, module):
GROUP_COUNT = tl.constexpr(0)
TILE_COUNT = tl.constexpr(1)
LENGTH_FIELDS = tl.constexpr(4)
# group_place, int32:
GROUP_START = tl.constexpr(0)  # index in perm of the first token
GROUP_TOKENS = tl.constexpr(1)
GROUP_TILES = tl.constexpr(2)  # number of tiles of A
GROUP_RANKS = tl.constexpr(3)  # rank of each slice
GROUP_FIELDS = tl.constexpr(8)
# group_b, int64, and group_scale, float32, have one field per slice:
SLICE_FIELDS = tl.constexpr(4)
# tile_place, int32:
TILE_GROUP = tl.constexpr(0)
TILE_START = tl.constexpr(1)  # index in perm of the group's first token
TILE_TOKENS = tl.constexpr(2)
TILE_FIRST_ROW = tl.constexpr(3)  # first row of A
TILE_ROWS = tl.constexpr(4)
TILE_FIELDS = tl.constexpr(8)

PLANE_ALIGN = tl.constexpr(128)
"""The width of a plane is a multiple of this, and this is a multiple of every tile's number of rows."""


@triton.jit(do_not_specialize=["T"])
def sort_tokens(
    slot_of_token,  # int32 [T], negative: no adapter
    turn,  # int32 [slots], position of each slot in AdapterTables.order
    count,  # int32 [slots], written: tokens of each slot
    perm,  # int32 [T], written: indices of tokens with an adapter, sorted by turn
    T,
    BLOCK: tl.constexpr,
):
    """Sort the tokens of a step by their slot's ``turn``. Program s writes the tokens of slot s to ``perm``."""
    slot = tl.program_id(0)
    own_turn = tl.load(turn + slot)
    lanes = tl.arange(0, BLOCK)
    tokens_before = 0
    own_tokens = 0
    for start in range(0, T, BLOCK):
        index = start + lanes
        slots = tl.load(slot_of_token + index, mask=index < T, other=-1)
        has_adapter = slots >= 0
        turns = tl.load(turn + slots, mask=has_adapter, other=0)
        tokens_before += tl.sum((has_adapter & (turns < own_turn)).to(tl.int32), 0)
        own_tokens += tl.sum((slots == slot).to(tl.int32), 0)
    tl.store(count + slot, own_tokens)
    if own_tokens > 0:
        written = tokens_before
        for start in range(0, T, BLOCK):
            index = start + lanes
            slots = tl.load(slot_of_token + index, mask=index < T, other=-1)
            own = (slots == slot).to(tl.int32)
            target = written + tl.cumsum(own, 0) - own
            tl.store(perm + target, index, mask=own > 0)
            written += tl.sum(own, 0)


@triton.jit
def _of_module(module, first, second, third, fourth):
    return tl.where(module == 0, first, tl.where(module == 1, second, tl.where(module == 2, third, fourth)))


@triton.jit
def _write_groups(
    group_place, group_b, group_scale, group, start_token, tokens, tiles, base, layout_row, scale_row, mask
):
    """Write one group for each slot in ``mask``. It has ``tokens`` tokens, from index ``start_token`` of perm on."""
    place = group_place + group * GROUP_FIELDS
    tl.store(place + GROUP_START, start_token, mask=mask)
    tl.store(place + GROUP_TOKENS, tokens, mask=mask)
    tl.store(place + GROUP_TILES, tiles, mask=mask)
    for i in tl.static_range(MAX_SLICES):
        rank = tl.load(layout_row + RANKS + i, mask=mask, other=0).to(tl.int32)
        b = base + tl.load(layout_row + B_OFFSETS + i, mask=mask, other=0)
        scale = tl.load(scale_row + i, mask=mask, other=0.0)
        tl.store(place + GROUP_RANKS + i, rank, mask=mask)
        tl.store(group_b + group * SLICE_FIELDS + i, b, mask=mask)
        tl.store(group_scale + group * SLICE_FIELDS + i, scale, mask=mask)


@triton.jit
def _write_tiles(
    tile_a,
    tile_place,
    first_tile,
    tiles,
    most_tiles,
    has_group,
    group,
    start_token,
    tokens,
    a,
    a_rows,
    k,
    br,
    BLOCK: tl.constexpr,
):
    """Write all tiles of one group for each slot in ``has_group``. A slot has at most ``most_tiles`` tiles."""
    for tile0 in range(0, most_tiles, BLOCK):
        index = tile0 + tl.arange(0, BLOCK)[None, :]
        mask = has_group[:, None] & (index < tiles[:, None])
        tile = first_tile[:, None] + index
        place = tile_place + tile * TILE_FIELDS
        same_for_all = index * 0
        tl.store(tile_a + tile, a[:, None] + index.to(tl.int64) * br * k, mask=mask)
        tl.store(place + TILE_GROUP, group[:, None] + same_for_all, mask=mask)
        tl.store(place + TILE_START, start_token[:, None] + same_for_all, mask=mask)
        tl.store(place + TILE_TOKENS, tokens[:, None] + same_for_all, mask=mask)
        tl.store(place + TILE_FIRST_ROW, index * br + group[:, None] * 0, mask=mask)
        tl.store(place + TILE_ROWS, tl.minimum(br, a_rows[:, None] - index * br), mask=mask)


@triton.jit
def _read_slots(count, order, base, layout, scales, SLOTS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr):
    """Read each slot's token count and its adapter's data for one (layer, module). Lane i reads slot order[i].

    Returns the token count, the addresses of the slot's rows of ``layout`` and ``scales``, the pool offsets of the slab
    and of A, and the number of rows of A.
    """
    lane = tl.arange(0, LANES)
    is_slot = lane < SLOTS
    slot = tl.load(order + lane, mask=is_slot, other=0)
    tokens = tl.load(count + slot, mask=is_slot, other=0)
    table_row = slot.to(tl.int64) * ROWS + tl.program_id(0)
    layout_row = layout + table_row * LAYOUT_FIELDS
    slab = tl.load(base + slot, mask=is_slot, other=0)
    a = slab + tl.load(layout_row + A_OFFSET, mask=is_slot, other=0)
    a_rows = tl.load(layout_row + A_ROWS, mask=is_slot, other=0).to(tl.int32)
    return tokens, layout_row, scales + table_row * MAX_SLICES, slab, a, a_rows


@triton.jit
def list_work(
    count,  # int32 [slots]
    order,  # int32 [slots], slots by descending rank
    base,  # int64 [slots]
    layout,  # int64 [slots, rows, LAYOUT_FIELDS], fields as in tables.py
    scales,  # float32 [slots, rows, MAX_SLICES]
    lengths,  # int32 [rows, LENGTH_FIELDS], written
    tile_a,  # int64 [rows, TILES], written: element offset of the tile's first row in the pool
    tile_place,  # int32 [rows, TILES, TILE_FIELDS], written
    group_b,  # int64 [rows, GROUPS, SLICE_FIELDS], written: element offset of each slice's B in the pool
    group_place,  # int32 [rows, GROUPS, GROUP_FIELDS], written
    group_scale,  # float32 [rows, GROUPS, SLICE_FIELDS], written
    # LANES is SLOTS rounded up to a power of two. ROWS is layers * modules.
    SLOTS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, GROUPS: tl.constexpr,
    # For each module: inputs (K), tokens per group (BM) and rows per tile (BR).
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, K3: tl.constexpr,
    BM0: tl.constexpr, BM1: tl.constexpr, BM2: tl.constexpr, BM3: tl.constexpr,
    BR0: tl.constexpr, BR1: tl.constexpr, BR2: tl.constexpr, BR3: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """List the groups and tiles. Program r handles row r = layer * 4 + module. Lane i handles slot order[i]."""
    row = tl.program_id(0)
    module = row % 4
    k = _of_module(module, K0, K1, K2, K3)
    bm = _of_module(module, BM0, BM1, BM2, BM3)
    br = _of_module(module, BR0, BR1, BR2, BR3)
    tokens, layout_row, scale_row, slab, a, a_rows = _read_slots(count, order, base, layout, scales, SLOTS, LANES, ROWS)
    has_work = (tokens > 0) & (a_rows > 0)
    groups = tl.where(has_work, tl.cdiv(tokens, bm), 0)
    tiles = tl.cdiv(a_rows, br)
    first_token = tl.cumsum(tokens, 0) - tokens
    first_group = tl.cumsum(groups, 0) - groups
    first_tile = tl.cumsum(groups * tiles, 0) - groups * tiles
    tl.store(lengths + row * LENGTH_FIELDS + GROUP_COUNT, tl.sum(groups, 0))
    tl.store(lengths + row * LENGTH_FIELDS + TILE_COUNT, tl.sum(groups * tiles, 0))
    most_tiles = tl.max(tl.where(has_work, tiles, 0), 0)
    for j in range(0, tl.max(groups, 0)):
        has_group = j < groups
        start_token, length = first_token + j * bm, tl.minimum(bm, tokens - j * bm)
        _write_groups(
            group_place=group_place, group_b=group_b, group_scale=group_scale,
            group=row * GROUPS + first_group + j, start_token=start_token, tokens=length, tiles=tiles, base=slab,
            layout_row=layout_row, scale_row=scale_row, mask=has_group,
        )  # fmt: skip
        _write_tiles(
            tile_a=tile_a, tile_place=tile_place, first_tile=row * TILES + first_tile + j * tiles,
            tiles=tiles, most_tiles=most_tiles, has_group=has_group, group=first_group + j,
            start_token=start_token, tokens=length, a=a, a_rows=a_rows, k=k, br=br, BLOCK=BLOCK,
        )  # fmt: skip


def device_name(device: torch.device) -> str:
    """Return the device's name in the tuning tables."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


def pick_blocks(tables: AdapterTables, tokens: int, max_rank: int) -> tuple[Blocks, ...]:
    """Return the block sizes of each module for steps of ``tokens`` tokens."""
    gpu = device_name(tables.base.device)
    return tuple(
        pick(gpu, k, widths, tokens, max_rank)
        for k, widths in zip(tables.in_features, tables.out_features, strict=True)
    )


def most_groups(tokens: int, slots: int, blocks: Blocks) -> int:
    """Return an upper bound on the number of groups: one partial group per adapter plus the full groups."""
    return min(tokens, slots) + tokens // blocks.bm


class Workspace:
    """Scratch memory that all launches on one stream share. Each call of ``add_lora`` overwrites it.

    ``planes`` float32 [split, tokens, plane_width] holds the partial sums of h = x @ A^T, one plane per part of the
    input features. ``hidden`` [2, tokens, 3 * max_rank], in the pool's dtype, holds h and its rounding remainder. Three
    int32 arrays of counters are zero between launches: ``tile_parts`` (finished parts of each tile), ``group_tiles``
    (finished tiles of each group) and ``ticket_counter`` (work items handed out, finished programs).
    """

    def __init__(
        self,
        tables: AdapterTables,
        tokens: int,
        max_rank: int,
        dtype: torch.dtype,
        blocks: tuple[Blocks, ...] | None = None,
    ) -> None:
        """Allocate memory for steps of up to ``tokens`` tokens and adapters of ranks up to ``max_rank``.

        ``blocks`` holds the block sizes of each module. The default is the tuned sizes.
        """
        device = tables.base.device
        self.tokens = tokens
        # Each slice starts at a multiple of 16 columns, because h is read 128 bits at a time.
        self.max_rank = -(-max_rank // 16) * 16
        width = adapter_tables.MAX_SLICES * self.max_rank
        sizes = sorted({min(limit, tokens) for limit in TOKEN_BUCKETS})
        steps = [(size, b) for size in sizes for b in blocks or pick_blocks(tables, size, self.max_rank)]
        groups = max(most_groups(size, len(tables.base), b) for size, b in steps)
        tiles = max(most_groups(size, len(tables.base), b) * -(-width // b.br) for size, b in steps)
        self.plane_width = -(-width // PLANE_ALIGN.value) * PLANE_ALIGN.value
        rows = max(size * b.split for size, b in steps)
        self.planes = torch.empty(rows * self.plane_width, dtype=torch.float32, device=device)
        self.hidden = torch.empty(2 * tokens * width, dtype=dtype, device=device)
        self.tile_parts = torch.zeros(tiles, dtype=torch.int32, device=device)
        self.group_tiles = torch.zeros(triton.next_power_of_2(groups), dtype=torch.int32, device=device)
        self.ticket_counter = torch.zeros(2, dtype=torch.int32, device=device)


class LoraWork:
    """The work lists of one step of up to ``tokens`` tokens, for each (layer, module). ``plan`` overwrites them.

    The buffers' addresses never change. For steps of equal size, ``plan`` makes equal launches and reads nothing back,
    so one captured graph works for all of these steps.
    """

    def __init__(
        self, tables: AdapterTables, workspace: Workspace, tokens: int, blocks: tuple[Blocks, ...] | None = None
    ) -> None:
        """Allocate the lists. ``blocks`` holds the block sizes of each module. The default is the tuned sizes.

        Raises ValueError if the lists need a larger ``workspace``.
        """
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
        self.lengths = buffer(rows, LENGTH_FIELDS.value)
        self.tile_a = buffer(rows, tiles, dtype=torch.int64)
        self.tile_place = buffer(rows, tiles, TILE_FIELDS.value)
        self.group_b = buffer(rows, self.groups, SLICE_FIELDS.value, dtype=torch.int64)
        self.group_place = buffer(rows, self.groups, GROUP_FIELDS.value)
        self.group_scale = buffer(rows, self.groups, SLICE_FIELDS.value, dtype=torch.float32)

    def plan(self, slot_of_token: torch.Tensor) -> None:
        """Write the work lists of a step, without waiting for the device.

        ``slot_of_token`` int32, on the device, has one entry per token of the step, at most ``tokens``. It is negative
        for tokens without an adapter.
        """
        self.used = len(slot_of_token)
        assert self.used <= self.tokens, (self.used, self.tokens)
        assert slot_of_token.dtype == torch.int32, slot_of_token.dtype
        if self.used == 0:
            return
        tables = self.tables
        slots, rows = len(tables.base), self.lengths.shape[0]
        sort_tokens[(slots,)](
            slot_of_token=slot_of_token, turn=tables.turn, count=self.count, perm=self.perm,
            T=self.used, BLOCK=SORT_BLOCK,
        )  # fmt: skip
        list_work[(rows,)](
            count=self.count, order=tables.order, base=tables.base, layout=tables.layout, scales=tables.scales,
            lengths=self.lengths, tile_a=self.tile_a, tile_place=self.tile_place,
            group_b=self.group_b, group_place=self.group_place, group_scale=self.group_scale,
            SLOTS=slots, LANES=triton.next_power_of_2(slots), ROWS=rows,
            TILES=self.tile_a.shape[1], GROUPS=self.groups, BLOCK=TILE_BLOCK,
            **{f"K{i}": k for i, k in enumerate(tables.in_features)},
            **{f"BM{i}": b.bm for i, b in enumerate(self.blocks)},
            **{f"BR{i}": b.br for i, b in enumerate(self.blocks)},
        )  # fmt: skip

    def _most_tiles(self, module: int) -> int:
        b = self.blocks[module]
        rank = len(self.tables.out_features[module]) * self.workspace.max_rank
        return most_groups(self.tokens, len(self.tables.base), b) * -(-rank // b.br)

    def _check_room(self, tiles: int) -> None:
        space = self.workspace
        rows = self.tokens * max(b.split for b in self.blocks)
        assert all(PLANE_ALIGN.value % b.br == 0 for b in self.blocks), "a tile would reach into the next token's plane"
        if (
            self.tokens > space.tokens
            or rows * space.plane_width > space.planes.numel()
            or tiles > len(space.tile_parts)
            or self.groups > len(space.group_tiles)
        ):
            raise ValueError(f"{self.tokens} tokens in blocks of {self.blocks} exceed a workspace for {space.tokens}")
