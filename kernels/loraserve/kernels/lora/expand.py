"""LoRA expand kernel: adds ``sum over r of h[m, r] * B[r, n]`` to ``y[perm[m], n]`` for each slice, rounding once.

h is the result of the shrink kernel. work.py defines the layout of the work lists.
"""

import triton
import triton.language as tl

from loraserve.kernels.lora.work import (
    GROUP_COUNT,
    GROUP_FIELDS,
    GROUP_RANKS,
    GROUP_START,
    GROUP_TILES,
    GROUP_TOKENS,
    MAX_SLICES,
    SLICE_FIELDS,
)


@triton.jit
def wait_for_tiles(group_tiles, group, wanted):
    """Spin until the counter of ``group`` in ``group_tiles`` shows ``wanted`` finished tiles of h."""
    while tl.atomic_add(group_tiles + group, 0, sem="acquire") < wanted:
        pass


@triton.jit
def expand_sums(
    b_at,  # [BE, BN], the first ranks of B
    h_at,  # [BM, BE]
    low,  # offset in elements from h to its rounding remainder
    rank, width, m_mask, n_mask,
    LOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Return h @ B for one block, float32 [BM, BN]."""
    ranks = tl.arange(0, BE)
    sums = tl.zeros((BM, BN), tl.float32)
    for r in tl.range(0, rank, BE, num_stages=STAGES):
        r_mask = ranks < rank - r
        b_tile = tl.load(b_at, mask=r_mask[:, None] & n_mask[None, :], other=0.0)
        # Load whole vectors of 8. h is zero between the rank and the next multiple of 8.
        h_mask = m_mask[:, None] & (ranks // 8 < (rank - r + 7) // 8)[None, :]
        # Bypass the L1 cache, because other programs may have written h during this launch.
        h_tile = tl.load(h_at, mask=h_mask, other=0.0, cache_modifier=".cg")
        sums = tl.dot(h_tile, b_tile, sums, input_precision="ieee")
        if LOW:
            h_low = tl.load(h_at + low, mask=h_mask, other=0.0, cache_modifier=".cg")
            sums = tl.dot(h_low, b_tile, sums, input_precision="ieee")
        b_at += BE * width
        h_at += BE
    return sums


@triton.jit
def expand_tile(
    y,  # [T, N0 + N1 + N2]
    pool,
    hidden,  # [2, T, MAX_SLICES * MAX_RANK], layout as in shrink.py
    perm, group_place, group_b,
    group_tiles,  # int32 [GROUPS], finished tiles of each group's h; read only with WAIT
    group, block, T,
    WAIT: tl.constexpr, MAX_RANK: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
    LOW: tl.constexpr, ALIGN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add h @ B to one block of outputs of one group. Blocks do not cross slices.

    h is read from memory in the weights' dtype: ptxas 12.8 miscompiles wgmma on sm_90 if an operand was computed
    in registers. With LOW, h is stored as a rounded value plus its remainder, which keeps the precision.
    """
    BLOCKS0: tl.constexpr = (N0 + BN - 1) // BN
    BLOCKS1: tl.constexpr = (N1 + BN - 1) // BN
    EVEN: tl.constexpr = (N0 % BN == 0) & (N1 % BN == 0) & (N2 % BN == 0)
    WIDTH: tl.constexpr = MAX_SLICES * MAX_RANK
    index = tl.where(block < BLOCKS0, 0, tl.where(block < BLOCKS0 + BLOCKS1, 1, 2))
    block_in_slice = block - tl.where(index == 0, 0, tl.where(index == 1, BLOCKS0, BLOCKS0 + BLOCKS1))
    width = tl.multiple_of(tl.where(index == 0, N0, tl.where(index == 1, N1, N2)), ALIGN)
    y_column = tl.multiple_of(tl.where(index == 0, 0, tl.where(index == 1, N0, N0 + N1)), ALIGN)
    place = group_place + group * GROUP_FIELDS
    rank = tl.load(place + GROUP_RANKS + index)
    if rank > 0:
        first = tl.load(place + GROUP_START)
        b = pool + tl.multiple_of(tl.load(group_b + group * SLICE_FIELDS + index), ALIGN)
        m = tl.arange(0, BM)
        m_mask = m < tl.load(place + GROUP_TOKENS)
        n = block_in_slice * BN + tl.arange(0, BN)
        n_mask = n < (block_in_slice * BN + BN if EVEN else width)
        ranks = tl.arange(0, BE)
        b_at = b + ranks.to(tl.int64)[:, None] * width + n[None, :]
        h_at = hidden + (first + m).to(tl.int64)[:, None] * WIDTH + (index * MAX_RANK + ranks)[None, :]
        # Read everything that does not depend on h before waiting for h.
        token = tl.load(perm + first + m, mask=m_mask, other=0).to(tl.int64)
        y_at = y + token[:, None] * (N0 + N1 + N2) + (y_column + n)[None, :]
        y_mask = m_mask[:, None] & n_mask[None, :]
        before = tl.load(y_at, mask=y_mask, other=0.0)
        if WAIT:
            wait_for_tiles(group_tiles, group, tl.load(place + GROUP_TILES))
        sums = expand_sums(
            b_at=b_at, h_at=h_at, low=tl.cast(T, tl.int64) * WIDTH, rank=rank, width=width,
            m_mask=m_mask, n_mask=n_mask, LOW=LOW, BM=BM, BN=BN, BE=BE, STAGES=STAGES,
        )  # fmt: skip
        tl.store(y_at, (before.to(tl.float32) + sums).to(y.dtype.element_ty), mask=y_mask)


@triton.jit(do_not_specialize=["T"])
def expand(
    y, pool, hidden, perm, lengths, group_place, group_b, T,
    MAX_RANK: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, LOW: tl.constexpr,
    ALIGN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add h @ B to all output blocks of all groups, with a fixed number of programs."""
    BLOCKS: tl.constexpr = (N0 + BN - 1) // BN + (N1 + BN - 1) // BN + (N2 + BN - 1) // BN
    total = tl.load(lengths + GROUP_COUNT) * BLOCKS
    work = tl.program_id(0)
    while work < total:
        expand_tile(
            y=y, pool=pool, hidden=hidden, perm=perm, group_place=group_place, group_b=group_b,
            group_tiles=group_place, group=work // BLOCKS, block=work % BLOCKS, T=T, WAIT=False,
            MAX_RANK=MAX_RANK, N0=N0, N1=N1, N2=N2, LOW=LOW, ALIGN=ALIGN, BM=BM, BN=BN, BE=BE, STAGES=STAGES,
        )  # fmt: skip
        work += tl.num_programs(0)
