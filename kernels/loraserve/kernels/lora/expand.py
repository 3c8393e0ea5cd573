"""From rank space to outputs: ``y[perm[m], n] += sum over r of h[m, r] * B[r, n]``, slice by slice, rounded once."""

import triton
import triton.language as tl


@triton.jit
def expand_tile(
    y,  # [T, N0 + N1 + N2]
    pool,
    hidden,  # [2, T, 3 * MAX_RANK], see shrink.py
    perm,
    group_place,
    group_b,
    ready,  # int32 [GROUPS]: tiles of each group whose h is there; not looked at without WAIT
    group,
    block,
    T,
    WAIT: tl.constexpr,
    MAX_RANK: tl.constexpr,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    LOW: tl.constexpr,
    ALIGN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One block of outputs of one group; blocks do not cross slices.

    h comes from memory in the weights' dtype: with an operand made in registers, ptxas 12.8 miscompiles wgmma on sm_90.
    With LOW it is the sum of two such numbers, so that nothing is rounded before y is.
    """
    BLOCKS0: tl.constexpr = (N0 + BN - 1) // BN
    BLOCKS1: tl.constexpr = (N1 + BN - 1) // BN
    EVEN: tl.constexpr = (N0 % BN == 0) & (N1 % BN == 0) & (N2 % BN == 0)
    index = tl.where(block < BLOCKS0, 0, tl.where(block < BLOCKS0 + BLOCKS1, 1, 2))
    in_slice = block - tl.where(index == 0, 0, tl.where(index == 1, BLOCKS0, BLOCKS0 + BLOCKS1))
    width = tl.multiple_of(tl.where(index == 0, N0, tl.where(index == 1, N1, N2)), ALIGN)
    y_column = tl.multiple_of(tl.where(index == 0, 0, tl.where(index == 1, N0, N0 + N1)), ALIGN)
    place = group_place + group * 8
    rank = tl.load(place + 3 + index)
    if rank > 0:
        first = tl.load(place)
        b = pool + tl.multiple_of(tl.load(group_b + group * 4 + index), ALIGN)
        m = tl.arange(0, BM)
        m_there = m < tl.load(place + 1)
        n = in_slice * BN + tl.arange(0, BN)
        n_there = n < (in_slice * BN + BN if EVEN else width)
        ranks = tl.arange(0, BE)
        b_at = b + ranks.to(tl.int64)[:, None] * width + n[None, :]
        h_at = hidden + (first + m).to(tl.int64)[:, None] * (3 * MAX_RANK) + (index * MAX_RANK + ranks)[None, :]
        low = tl.cast(T, tl.int64) * (3 * MAX_RANK)
        # What does not depend on h is read before h is waited for.
        token = tl.load(perm + first + m, mask=m_there, other=0).to(tl.int64)
        y_at = y + token[:, None] * (N0 + N1 + N2) + (y_column + n)[None, :]
        y_there = m_there[:, None] & n_there[None, :]
        before = tl.load(y_at, mask=y_there, other=0.0)
        if WAIT:
            wanted = tl.load(place + 2)
            while tl.atomic_add(ready + group, 0, sem="acquire") < wanted:
                pass
        sums = tl.zeros((BM, BN), tl.float32)
        for r in tl.range(0, rank, BE, num_stages=STAGES):
            r_there = ranks < rank - r
            b_tile = tl.load(b_at, mask=r_there[:, None] & n_there[None, :], other=0.0)
            # Whole vectors: what lies between the last rank and the next multiple of 8 is zero.
            h_there = m_there[:, None] & (ranks // 8 < (rank - r + 7) // 8)[None, :]
            # Other programs may have written it during this launch: not from this core's own cache.
            sums = tl.dot(
                tl.load(h_at, mask=h_there, other=0.0, cache_modifier=".cg"), b_tile, sums, input_precision="ieee"
            )
            if LOW:
                h_low = tl.load(h_at + low, mask=h_there, other=0.0, cache_modifier=".cg")
                sums = tl.dot(h_low, b_tile, sums, input_precision="ieee")
            b_at += BE * width
            h_at += BE
        tl.store(y_at, (before.to(tl.float32) + sums).to(y.dtype.element_ty), mask=y_there)


@triton.jit(do_not_specialize=["T"])
def expand(
    y,
    pool,
    hidden,
    perm,
    lengths,
    group_place,
    group_b,
    T,
    MAX_RANK: tl.constexpr,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    LOW: tl.constexpr,
    ALIGN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """All blocks of all groups, by a fixed number of programs."""
    BLOCKS: tl.constexpr = (N0 + BN - 1) // BN + (N1 + BN - 1) // BN + (N2 + BN - 1) // BN
    total = tl.load(lengths) * BLOCKS
    work = tl.program_id(0)
    while work < total:
        expand_tile(
            y, pool, hidden, perm, group_place, group_b, group_place, work // BLOCKS, work % BLOCKS, T,
            False, MAX_RANK, N0, N1, N2, LOW, ALIGN, BM, BN, BE, STAGES,
        )  # fmt: skip
        work += tl.num_programs(0)
