"""What a step's LoRA kernels have to do, listed on the device: two launches a step, whatever its layers and modules.

``sort_tokens`` brings tokens of one adapter together; ``list_work`` cuts them into groups of at most bm tokens and the
adapters' weights into tiles of br rows, for every (layer, module). Nothing is read back: lengths stay on the device, so
that a captured graph serves every batch of its size.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T"])
def sort_tokens(
    slot_of_token,  # int32 [T], negative: no adapter
    turn,  # int32 [slots], place of each slot in the order of work
    count,  # int32 [slots], written: tokens of each slot
    perm,  # int32 [T], written: tokens, slot after slot in their turn; the rest is left alone
    T,
    BLOCK: tl.constexpr,
):
    """Program s lists the tokens of slot s, in their order."""
    slot = tl.program_id(0)
    mine = tl.load(turn + slot)
    lanes = tl.arange(0, BLOCK)
    before = 0
    own = 0
    for start in range(0, T, BLOCK):
        index = start + lanes
        of_token = tl.load(slot_of_token + index, mask=index < T, other=-1)
        used = of_token >= 0
        place = tl.load(turn + of_token, mask=used, other=0)
        before += tl.sum((used & (place < mine)).to(tl.int32), 0)
        own += tl.sum((of_token == slot).to(tl.int32), 0)
    tl.store(count + slot, own)
    if own > 0:
        done = before
        for start in range(0, T, BLOCK):
            index = start + lanes
            of_token = tl.load(slot_of_token + index, mask=index < T, other=-1)
            hit = (of_token == slot).to(tl.int32)
            target = done + tl.cumsum(hit, 0) - hit
            tl.store(perm + target, index, mask=hit > 0)
            done += tl.sum(hit, 0)


@triton.jit
def _of_module(module, first, second, third, fourth):
    return tl.where(module == 0, first, tl.where(module == 1, second, tl.where(module == 2, third, fourth)))


@triton.jit
def list_work(
    count,  # int32 [slots]
    order,  # int32 [slots], slots in the order of work
    base,  # int64 [slots]
    layout,  # int64 [slots, rows, 8], see tables.py
    scales,  # float32 [slots, rows, 3]
    lengths,  # int32 [rows, 4], written: groups, tiles
    tile_a,  # int64 [rows, TILES], written: where the tile's first row of A lies in the pool
    tile_place,  # int32 [rows, TILES, 8], written: group, first token in perm, tokens, first row, rows
    group_b,  # int64 [rows, GROUPS, 4], written: where each slice's B lies in the pool
    group_place,  # int32 [rows, GROUPS, 8], written: first token in perm, tokens, tiles, rank of each slice
    group_scale,  # float32 [rows, GROUPS, 4], written
    SLOTS: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    GROUPS: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    K3: tl.constexpr,
    BM0: tl.constexpr,
    BM1: tl.constexpr,
    BM2: tl.constexpr,
    BM3: tl.constexpr,
    BR0: tl.constexpr,
    BR1: tl.constexpr,
    BR2: tl.constexpr,
    BR3: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program r lists the work of row r = layer * 4 + module; a lane is a slot in its turn."""
    row = tl.program_id(0)
    module = row % 4
    k = _of_module(module, K0, K1, K2, K3)
    bm = _of_module(module, BM0, BM1, BM2, BM3)
    br = _of_module(module, BR0, BR1, BR2, BR3)
    lane = tl.arange(0, LANES)
    there = lane < SLOTS
    slot = tl.load(order + lane, mask=there, other=0)
    tokens = tl.load(count + slot, mask=there, other=0)
    entry = slot.to(tl.int64) * ROWS + row
    fields = layout + entry * 8
    start = tl.load(base + slot, mask=there, other=0)
    a = start + tl.load(fields, mask=there, other=0)
    total = tl.load(fields + 1, mask=there, other=0).to(tl.int32)

    live = (tokens > 0) & (total > 0)
    groups = tl.where(live, tl.cdiv(tokens, bm), 0)
    tiles = tl.cdiv(total, br)
    first_token = tl.cumsum(tokens, 0) - tokens
    first_group = tl.cumsum(groups, 0) - groups
    first_tile = tl.cumsum(groups * tiles, 0) - groups * tiles
    tl.store(lengths + row * 4, tl.sum(groups, 0))
    tl.store(lengths + row * 4 + 1, tl.sum(groups * tiles, 0))

    most_tiles = tl.max(tl.where(live, tiles, 0), 0)
    for j in range(0, tl.max(groups, 0)):
        mine = j < groups
        group = row * GROUPS + first_group + j
        place = group_place + group * 8
        length = tl.minimum(bm, tokens - j * bm)
        tl.store(place, first_token + j * bm, mask=mine)
        tl.store(place + 1, length, mask=mine)
        tl.store(place + 2, tiles, mask=mine)
        for i in tl.static_range(3):
            rank = tl.load(fields + 2 + i, mask=mine, other=0).to(tl.int32)
            b = start + tl.load(fields + 5 + i, mask=mine, other=0)
            scale = tl.load(scales + entry * 3 + i, mask=mine, other=0.0)
            tl.store(place + 3 + i, rank, mask=mine)
            tl.store(group_b + group * 4 + i, b, mask=mine)
            tl.store(group_scale + group * 4 + i, scale, mask=mine)
        for tile0 in range(0, most_tiles, BLOCK):
            q = tile0 + tl.arange(0, BLOCK)[None, :]
            wanted = mine[:, None] & (q < tiles[:, None])
            tile = row * TILES + (first_tile + j * tiles)[:, None] + q
            own = tile_place + tile * 8
            tl.store(tile_a + tile, a[:, None] + q.to(tl.int64) * br * k, mask=wanted)
            tl.store(own, (first_group + j)[:, None] + q * 0, mask=wanted)
            tl.store(own + 1, (first_token + j * bm)[:, None] + q * 0, mask=wanted)
            tl.store(own + 2, length[:, None] + q * 0, mask=wanted)
            tl.store(own + 3, q * br + tiles[:, None] * 0, mask=wanted)
            tl.store(own + 4, tl.minimum(br, total[:, None] - q * br), mask=wanted)
