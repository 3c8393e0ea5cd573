"""Shrink and expand in one launch, for steps of few tokens: nothing waits for a kernel to drain between the two."""

import triton
import triton.language as tl

from loraserve.kernels.lora.expand import expand_tile
from loraserve.kernels.lora.shrink import shrink_tile


@triton.jit(do_not_specialize=["T"])
def decode(
    x,
    y,
    pool,
    planes,
    hidden,
    perm,
    lengths,
    tile_a,
    tile_place,
    parts,
    group_b,
    group_place,
    group_scale,
    ready,  # int32 [GROUPS], zero before and after: tiles of each group whose h is there
    turnstile,  # int32 [2], zero before and after: pieces of work handed out, programs that are through
    T,
    MAX_RANK: tl.constexpr,
    K: tl.constexpr,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    SPLIT: tl.constexpr,
    LOW: tl.constexpr,
    A_ALIGN: tl.constexpr,
    B_ALIGN: tl.constexpr,
    GROUPS: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    BE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Work is handed out in order, every tile of A before every block of outputs.

    Whoever waits for a group's tiles knows that each is with a program which waits for nothing: there is no deadlock,
    however few programs run at a time. The last program through clears the state for the next launch.
    """
    BLOCKS: tl.constexpr = (N0 + BN - 1) // BN + (N1 + BN - 1) // BN + (N2 + BN - 1) // BN
    shrinks = tl.load(lengths + 1) * SPLIT
    total = shrinks + tl.load(lengths) * BLOCKS
    work = tl.atomic_add(turnstile, 1, sem="relaxed")
    while work < total:
        # Drawn ahead, so that its latency is spent beside the work at hand.
        following = tl.atomic_add(turnstile, 1, sem="relaxed")
        if work < shrinks:
            tile = work // SPLIT
            done = shrink_tile(
                x, pool, planes, hidden, perm, tile_a, tile_place, parts, group_place, group_scale,
                tile, work % SPLIT, T, MAX_RANK, K, SPLIT, LOW, A_ALIGN, BM, BR, BK, STAGES,
            )  # fmt: skip
            if done:
                # Every thread's share of h is written before the one that counts says so.
                tl.debug_barrier()
                tl.atomic_add(ready + tl.load(tile_place + tile * 8), 1, sem="release")
        else:
            expand_tile(
                y, pool, hidden, perm, group_place, group_b, ready, (work - shrinks) // BLOCKS,
                (work - shrinks) % BLOCKS, T, True, MAX_RANK, N0, N1, N2, LOW, B_ALIGN, BM, BN, BE, STAGES,
            )  # fmt: skip
        work = following
    if tl.atomic_add(turnstile + 1, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(ready + tl.arange(0, GROUPS), tl.zeros((GROUPS,), tl.int32))
        tl.store(turnstile + tl.arange(0, 2), tl.zeros((2,), tl.int32))
