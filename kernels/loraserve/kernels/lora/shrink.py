"""From inputs to rank space: ``h[m, r] = scale * sum over k of x[perm[m], k] * A[r, k]`` for tokens with an adapter.

K is cut into SPLIT parts that write one plane each; the program that comes last to a tile sums its planes in their
order. Nothing is added to atomically and nothing has to be zeroed: the same batch gives the same bits.
"""

import triton
import triton.language as tl


@triton.jit
def shrink_part(
    x,  # [T, K]
    pool,
    perm,
    tile_a,
    place,  # of the tile, in tile_place
    part,
    K: tl.constexpr,
    SPLIT: tl.constexpr,
    ALIGN: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sums [BM, BR] of one tile of A over one part of K, in float32."""
    PART: tl.constexpr = ((K + SPLIT - 1) // SPLIT + BK - 1) // BK * BK
    EVEN: tl.constexpr = PART * SPLIT == K
    rows = tl.arange(0, BR)
    row_there = rows < tl.load(place + 4)
    m = tl.arange(0, BM)
    m_there = m < tl.load(place + 2)
    # Without the hint every load of A would be scalar.
    a = pool + tl.multiple_of(tl.load(tile_a), ALIGN)
    token = tl.load(perm + tl.load(place + 1) + m, mask=m_there, other=0).to(tl.int64)
    kk = part * PART + tl.arange(0, BK)
    x_at = x + token[:, None] * K + kk[None, :]
    a_at = a + rows[None, :].to(tl.int64) * K + kk[:, None]
    sums = tl.zeros((BM, BR), tl.float32)
    for k in tl.range(0, PART, BK, num_stages=STAGES):
        if EVEN:
            x_tile = tl.load(x_at, mask=m_there[:, None], other=0.0)
            a_tile = tl.load(a_at, mask=row_there[None, :], other=0.0)
        else:
            k_there = kk + k < K
            x_tile = tl.load(x_at, mask=m_there[:, None] & k_there[None, :], other=0.0)
            a_tile = tl.load(a_at, mask=row_there[None, :] & k_there[:, None], other=0.0)
        sums = tl.dot(x_tile, a_tile, sums, input_precision="ieee")
        x_at += BK
        a_at += BK
    return sums


@triton.jit
def clear_padding(at, group_place, m_there, MAX_RANK: tl.constexpr):
    """Zeros from each slice's last rank to the next multiple of 8, up to which h is read."""
    for i in tl.static_range(3):
        rank = tl.load(group_place + 3 + i)
        column = rank // 8 * 8 + tl.arange(0, 8)
        zeros = (column * 0).to(at.dtype.element_ty)
        there = m_there[:, None] & ((column >= rank) & (rank % 8 != 0))[None, :]
        tl.store(at + (i * MAX_RANK + column)[None, :], zeros[None, :], mask=there)


@triton.jit
def keep_hidden(
    hidden,  # [2, T, 3 * MAX_RANK], slice i from column i * MAX_RANK on
    sums,
    place,
    group_place,
    group_scale,
    T,
    MAX_RANK: tl.constexpr,
    LOW: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
):
    """Scale and keep a tile of h in the weights' dtype; with LOW also what that rounding cut off."""
    group = tl.load(place)
    m = tl.arange(0, BM)
    row = tl.load(place + 3) + tl.arange(0, BR)
    rank0 = tl.load(group_place + group * 8 + 3)
    rank1 = tl.load(group_place + group * 8 + 4)
    index = (row >= rank0).to(tl.int32) + (row >= rank0 + rank1).to(tl.int32)
    column = index * MAX_RANK + row - tl.where(index == 0, 0, tl.where(index == 1, rank0, rank0 + rank1))
    m_there = m < tl.load(place + 2)
    there = m_there[:, None] & (tl.arange(0, BR) < tl.load(place + 4))[None, :]
    at = hidden + (tl.load(place + 1) + m).to(tl.int64)[:, None] * (3 * MAX_RANK)
    scaled = sums * tl.load(group_scale + group * 4 + index)[None, :]
    high = scaled.to(hidden.dtype.element_ty)
    tl.store(at + column[None, :], high, mask=there)
    first_tile = tl.load(place + 3) == 0
    if first_tile:
        clear_padding(at, group_place + group * 8, m_there, MAX_RANK)
    if LOW:
        at += tl.cast(T, tl.int64) * (3 * MAX_RANK)
        low = (scaled - high.to(tl.float32)).to(hidden.dtype.element_ty)
        tl.store(at + column[None, :], low, mask=there)
        if first_tile:
            clear_padding(at, group_place + group * 8, m_there, MAX_RANK)


@triton.jit
def shrink_tile(
    x,
    pool,
    planes,  # float32 [SPLIT, T, 3 * MAX_RANK rounded up to tiles], A's rows side by side
    hidden,
    perm,
    tile_a,
    tile_place,
    parts,  # int32 [tiles], zero before and after: parts of each tile that are done
    group_place,
    group_scale,
    tile,
    part,
    T,
    MAX_RANK: tl.constexpr,
    K: tl.constexpr,
    SPLIT: tl.constexpr,
    LOW: tl.constexpr,
    ALIGN: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One part of one tile. Returns whether the tile's h is there now, by this program's doing."""
    place = tile_place + tile * 8
    sums = shrink_part(x, pool, perm, tile_a + tile, place, part, K, SPLIT, ALIGN, BM, BR, BK, STAGES)
    last = part >= 0
    if SPLIT > 1:
        m = tl.arange(0, BM)
        rows = tl.arange(0, BR)
        # Whole tiles, so that accesses are as wide as can be; rows that are not there are zero.
        used = (m < tl.load(place + 2))[:, None] & (rows >= 0)[None, :]
        WIDTH: tl.constexpr = (3 * MAX_RANK + 127) // 128 * 128
        own = planes + (tl.load(place + 1) + m).to(tl.int64)[:, None] * WIDTH
        own += (tl.multiple_of(tl.load(place + 3), BR) + rows)[None, :]
        plane = tl.cast(T, tl.int64) * WIDTH
        tl.store(own + part * plane, sums, mask=used)
        # Every thread's share of the plane is written before the one that counts says so.
        tl.debug_barrier()
        last = tl.atomic_add(parts + tile, 1, sem="acq_rel") == SPLIT - 1
        if last:
            sums = tl.zeros((BM, BR), tl.float32)
            for p in tl.static_range(SPLIT):
                # Other programs wrote them during this launch: not from this core's own cache.
                sums += tl.load(own + p * plane, mask=used, other=0.0, cache_modifier=".cg")
            tl.store(parts + tile, 0)
    if last:
        keep_hidden(hidden, sums, place, group_place, group_scale, T, MAX_RANK, LOW, BM, BR)
    return last


@triton.jit(do_not_specialize=["T"])
def shrink(
    x,
    pool,
    planes,
    hidden,
    perm,
    lengths,  # int32 [4], groups and tiles of this (layer, module)
    tile_a,
    tile_place,
    parts,
    group_place,
    group_scale,
    T,
    MAX_RANK: tl.constexpr,
    K: tl.constexpr,
    SPLIT: tl.constexpr,
    LOW: tl.constexpr,
    ALIGN: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """All tiles, by a fixed number of programs."""
    total = tl.load(lengths + 1) * SPLIT
    work = tl.program_id(0)
    while work < total:
        shrink_tile(
            x, pool, planes, hidden, perm, tile_a, tile_place, parts, group_place, group_scale,
            work // SPLIT, work % SPLIT, T, MAX_RANK, K, SPLIT, LOW, ALIGN, BM, BR, BK, STAGES,
        )  # fmt: skip
        work += tl.num_programs(0)
