"""LoRA shrink kernel: computes ``h[m, r] = scale * sum over k of x[perm[m], k] * A[r, k]`` for tokens with an adapter.

The K inputs are split into SPLIT parts. The sums of each part go to a separate array, its plane. The program that
finishes the last part of a tile adds the planes in order. Sums are not added atomically, so equal batches give equal
bits. work.py defines the layout of the work lists.
"""

import triton
import triton.language as tl

from loraserve.kernels.lora.work import (
    GROUP_FIELDS,
    GROUP_RANKS,
    MAX_SLICES,
    PLANE_ALIGN,
    SLICE_FIELDS,
    TILE_COUNT,
    TILE_FIELDS,
    TILE_FIRST_ROW,
    TILE_GROUP,
    TILE_ROWS,
    TILE_START,
    TILE_TOKENS,
)


@triton.jit
def shrink_part(
    x,  # [T, K]
    pool, perm,
    tile_a,  # address of this tile's entry
    place,  # address of this tile's row in tile_place
    part,
    K: tl.constexpr, SPLIT: tl.constexpr, ALIGN: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Return the sums of one tile of h over one of the SPLIT parts of K, float32 [BM, BR]."""
    PART: tl.constexpr = ((K + SPLIT - 1) // SPLIT + BK - 1) // BK * BK
    EVEN: tl.constexpr = PART * SPLIT == K
    rows = tl.arange(0, BR)
    row_mask = rows < tl.load(place + TILE_ROWS)
    m = tl.arange(0, BM)
    m_mask = m < tl.load(place + TILE_TOKENS)
    # Without this alignment hint all loads of A would be scalar.
    a = pool + tl.multiple_of(tl.load(tile_a), ALIGN)
    token = tl.load(perm + tl.load(place + TILE_START) + m, mask=m_mask, other=0).to(tl.int64)
    kk = part * PART + tl.arange(0, BK)
    x_at = x + token[:, None] * K + kk[None, :]
    a_at = a + rows[None, :].to(tl.int64) * K + kk[:, None]
    sums = tl.zeros((BM, BR), tl.float32)
    for k in tl.range(0, PART, BK, num_stages=STAGES):
        if EVEN:
            x_tile = tl.load(x_at, mask=m_mask[:, None], other=0.0)
            a_tile = tl.load(a_at, mask=row_mask[None, :], other=0.0)
        else:
            k_mask = kk + k < K
            x_tile = tl.load(x_at, mask=m_mask[:, None] & k_mask[None, :], other=0.0)
            a_tile = tl.load(a_at, mask=row_mask[None, :] & k_mask[:, None], other=0.0)
        sums = tl.dot(x_tile, a_tile, sums, input_precision="ieee")
        x_at += BK
        a_at += BK
    return sums


@triton.jit
def clear_padding(at, group, m_mask, MAX_RANK: tl.constexpr):
    """Write zeros to h from each slice's rank to the next multiple of 8, because h is read in vectors of 8."""
    for i in tl.static_range(MAX_SLICES):
        rank = tl.load(group + GROUP_RANKS + i)
        column = rank // 8 * 8 + tl.arange(0, 8)
        zeros = (column * 0).to(at.dtype.element_ty)
        mask = m_mask[:, None] & ((column >= rank) & (rank % 8 != 0))[None, :]
        tl.store(at + (i * MAX_RANK + column)[None, :], zeros[None, :], mask=mask)


@triton.jit
def store_hidden(
    hidden,  # [2, T, MAX_SLICES * MAX_RANK]; slice i starts at column i * MAX_RANK
    sums, place, group_place, group_scale, T,
    MAX_RANK: tl.constexpr, LOW: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Scale a tile of h and store it in the weights' dtype. With LOW, also store the rounding remainder."""
    index = tl.load(place + TILE_GROUP)
    group = group_place + index * GROUP_FIELDS
    m = tl.arange(0, BM)
    first_row = tl.load(place + TILE_FIRST_ROW)
    row = first_row + tl.arange(0, BR)
    rank0 = tl.load(group + GROUP_RANKS)
    rank1 = tl.load(group + GROUP_RANKS + 1)
    in_slice = (row >= rank0).to(tl.int32) + (row >= rank0 + rank1).to(tl.int32)
    first_rank = tl.where(in_slice == 0, 0, tl.where(in_slice == 1, rank0, rank0 + rank1))
    column = in_slice * MAX_RANK + row - first_rank
    m_mask = m < tl.load(place + TILE_TOKENS)
    mask = m_mask[:, None] & (tl.arange(0, BR) < tl.load(place + TILE_ROWS))[None, :]
    at = hidden + (tl.load(place + TILE_START) + m).to(tl.int64)[:, None] * (MAX_SLICES * MAX_RANK)
    scaled = sums * tl.load(group_scale + index * SLICE_FIELDS + in_slice)[None, :]
    high = scaled.to(hidden.dtype.element_ty)
    tl.store(at + column[None, :], high, mask=mask)
    if first_row == 0:
        clear_padding(at, group, m_mask, MAX_RANK)
    if LOW:
        at += tl.cast(T, tl.int64) * (MAX_SLICES * MAX_RANK)
        low = (scaled - high.to(tl.float32)).to(hidden.dtype.element_ty)
        tl.store(at + column[None, :], low, mask=mask)
        if first_row == 0:
            clear_padding(at, group, m_mask, MAX_RANK)


@triton.jit
def add_to_planes(
    planes, sums,
    tile_parts,  # address of this tile's counter
    place, part, T,
    MAX_RANK: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Store one part's sums. Returns (True, total of all parts) for the tile's last part, else (False, ``sums``)."""
    m = tl.arange(0, BM)
    rows = tl.arange(0, BR)
    # Write all BR columns, so that accesses are as wide as possible. Columns without a row of A are zero.
    mask = (m < tl.load(place + TILE_TOKENS))[:, None] & (rows >= 0)[None, :]
    WIDTH: tl.constexpr = (MAX_SLICES * MAX_RANK + PLANE_ALIGN - 1) // PLANE_ALIGN * PLANE_ALIGN
    at = planes + (tl.load(place + TILE_START) + m).to(tl.int64)[:, None] * WIDTH
    at += (tl.multiple_of(tl.load(place + TILE_FIRST_ROW), BR) + rows)[None, :]
    plane = tl.cast(T, tl.int64) * WIDTH
    tl.store(at + part * plane, sums, mask=mask)
    # Increase the counter only after all threads have written the plane.
    tl.debug_barrier()
    is_last = tl.atomic_add(tile_parts, 1, sem="acq_rel") == SPLIT - 1
    if is_last:
        sums = tl.zeros((BM, BR), tl.float32)
        for p in tl.static_range(SPLIT):
            # Bypass the L1 cache, because other programs wrote the planes during this launch.
            sums += tl.load(at + p * plane, mask=mask, other=0.0, cache_modifier=".cg")
        tl.store(tile_parts, 0)
    return is_last, sums


@triton.jit
def shrink_tile(
    x, pool,
    planes,  # float32 [SPLIT, T, MAX_SLICES * MAX_RANK rounded up to PLANE_ALIGN], one column per row of A
    hidden, perm, tile_a, tile_place,
    tile_parts,  # int32 [tiles], finished parts of each tile; zero before and after the launch
    group_place, group_scale, tile, part, T,
    MAX_RANK: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr, LOW: tl.constexpr, ALIGN: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute one part of K of one tile of A. Returns whether all parts of the tile's h are now finished."""
    place = tile_place + tile * TILE_FIELDS
    sums = shrink_part(
        x=x, pool=pool, perm=perm, tile_a=tile_a + tile, place=place, part=part,
        K=K, SPLIT=SPLIT, ALIGN=ALIGN, BM=BM, BR=BR, BK=BK, STAGES=STAGES,
    )  # fmt: skip
    is_last = part >= 0
    if SPLIT > 1:
        is_last, sums = add_to_planes(
            planes=planes, sums=sums, tile_parts=tile_parts + tile, place=place, part=part, T=T,
            MAX_RANK=MAX_RANK, SPLIT=SPLIT, BM=BM, BR=BR,
        )  # fmt: skip
    if is_last:
        store_hidden(
            hidden=hidden, sums=sums, place=place, group_place=group_place, group_scale=group_scale, T=T,
            MAX_RANK=MAX_RANK, LOW=LOW, BM=BM, BR=BR,
        )  # fmt: skip
    return is_last


@triton.jit(do_not_specialize=["T"])
def shrink(
    x, pool, planes, hidden, perm,
    lengths,  # int32 [LENGTH_FIELDS], the row of this (layer, module)
    tile_a, tile_place, tile_parts, group_place, group_scale, T,
    MAX_RANK: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr, LOW: tl.constexpr, ALIGN: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute h for all tiles of A with a fixed number of programs."""
    total = tl.load(lengths + TILE_COUNT) * SPLIT
    work = tl.program_id(0)
    while work < total:
        shrink_tile(
            x=x, pool=pool, planes=planes, hidden=hidden, perm=perm, tile_a=tile_a, tile_place=tile_place,
            tile_parts=tile_parts, group_place=group_place, group_scale=group_scale,
            tile=work // SPLIT, part=work % SPLIT, T=T,
            MAX_RANK=MAX_RANK, K=K, SPLIT=SPLIT, LOW=LOW, ALIGN=ALIGN, BM=BM, BR=BR, BK=BK, STAGES=STAGES,
        )  # fmt: skip
        work += tl.num_programs(0)
