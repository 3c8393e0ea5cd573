"""LoRA shrink and expand in one kernel launch, for steps of few tokens. Expand starts before all of shrink is done."""

import triton
import triton.language as tl

from loraserve.kernels.lora.expand import expand_tile
from loraserve.kernels.lora.shrink import shrink_tile
from loraserve.kernels.lora.work import GROUP_COUNT, TILE_COUNT, TILE_FIELDS, TILE_GROUP


@triton.jit(do_not_specialize=["T"])
def decode(
    x, y, pool, planes, hidden, perm, lengths, tile_a, tile_place, tile_parts, group_b, group_place, group_scale,
    group_tiles,  # int32 [GROUPS], finished tiles of each group's h; zero before and after the launch
    ticket_counter,  # int32 [2], work items handed out and finished programs; zero before and after
    T,
    MAX_RANK: tl.constexpr, K: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
    SPLIT: tl.constexpr, LOW: tl.constexpr, A_ALIGN: tl.constexpr, B_ALIGN: tl.constexpr, GROUPS: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Process the work items in order: first all tiles of A, then all blocks of outputs.

    When a program waits for a group's tiles, running programs have already taken them, and computing a tile never
    waits. So no deadlock is possible, however few programs run at a time. The last program resets the counters.
    """
    BLOCKS: tl.constexpr = (N0 + BN - 1) // BN + (N1 + BN - 1) // BN + (N2 + BN - 1) // BN
    shrinks = tl.load(lengths + TILE_COUNT) * SPLIT
    total = shrinks + tl.load(lengths + GROUP_COUNT) * BLOCKS
    work = tl.atomic_add(ticket_counter, 1, sem="relaxed")
    while work < total:
        # Take the next ticket early, so that its latency overlaps with the current work.
        next_work = tl.atomic_add(ticket_counter, 1, sem="relaxed")
        if work < shrinks:
            tile = work // SPLIT
            tile_done = shrink_tile(
                x=x, pool=pool, planes=planes, hidden=hidden, perm=perm, tile_a=tile_a, tile_place=tile_place,
                tile_parts=tile_parts, group_place=group_place, group_scale=group_scale,
                tile=tile, part=work % SPLIT, T=T,
                MAX_RANK=MAX_RANK, K=K, SPLIT=SPLIT, LOW=LOW, ALIGN=A_ALIGN, BM=BM, BR=BR, BK=BK, STAGES=STAGES,
            )  # fmt: skip
            if tile_done:
                # Increase the counter only after all threads have written h.
                tl.debug_barrier()
                group = tl.load(tile_place + tile * TILE_FIELDS + TILE_GROUP)
                tl.atomic_add(group_tiles + group, 1, sem="release")
        else:
            expand_tile(
                y=y, pool=pool, hidden=hidden, perm=perm, group_place=group_place, group_b=group_b,
                group_tiles=group_tiles, group=(work - shrinks) // BLOCKS, block=(work - shrinks) % BLOCKS, T=T,
                WAIT=True, MAX_RANK=MAX_RANK, N0=N0, N1=N1, N2=N2, LOW=LOW, ALIGN=B_ALIGN,
                BM=BM, BN=BN, BE=BE, STAGES=STAGES,
            )  # fmt: skip
        work = next_work
    if tl.atomic_add(ticket_counter + 1, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(group_tiles + tl.arange(0, GROUPS), tl.zeros((GROUPS,), tl.int32))
        tl.store(ticket_counter + tl.arange(0, 2), tl.zeros((2,), tl.int32))
