"""Block sizes of the GPU kernels: measured values for known GPUs, safe defaults for all others.

scripts/tune_kernels measures them and writes a table. Its keys are the module (K and the widths of its slices), a
bucket of tokens and a bucket of ranks, because these decide which sizes are fast. A table is used only on GPUs of the
name that it was measured on.
"""

import logging
from functools import cache
from pathlib import Path

import msgspec

DECODE_TOKENS = 256
"""Steps of up to this many tokens use the one-launch kernel (decode.py)."""
DECODE_BK, PREFILL_BK = 128, 64
TOKEN_BUCKETS = (8, 32, 64, 128, 256, 1024, 4096, 1 << 30)
RANK_BUCKETS = (16, 64, 256)
TABLES = Path(__file__).parent / "tuned"


class Blocks(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes of one launch: ``bm`` tokens x ``br`` rows x ``bk`` of K, ``bn`` outputs x ``be`` ranks.

    ``split`` parts of K run side by side; ``programs`` is the grid, per multiprocessor. A thread of the one-launch
    kernel has at most ``registers``; the programs on a multiprocessor share 65536.
    """

    bm: int
    br: int
    bk: int
    bn: int
    be: int
    split: int
    warps: int = 4
    stages: int = 3
    programs: int = 3
    registers: int = 168


class TunedBlocks(msgspec.Struct, frozen=True, kw_only=True):
    """The fastest blocks that were found for one case, and their time as a multiple of the memory floor."""

    k: int
    widths: tuple[int, ...]
    tokens: int
    rank: int
    blocks: Blocks
    floor_ratio: float


class TuningTable(msgspec.Struct, frozen=True, kw_only=True):
    """All measurements on one kind of GPU, with the command and the date."""

    gpu: str
    command: str
    date: str
    entries: tuple[TunedBlocks, ...]


def bucket(value: int, buckets: tuple[int, ...]) -> int:
    """Return the smallest bucket that holds ``value``, or the last if none does."""
    return next((limit for limit in buckets if value <= limit), buckets[-1])


def pick(gpu: str, k: int, widths: tuple[int, ...], tokens: int, rank: int) -> Blocks:
    """Return the block sizes for a step of ``tokens`` tokens whose largest rank is ``rank``."""
    key = (k, widths, bucket(tokens, TOKEN_BUCKETS), bucket(rank, RANK_BUCKETS))
    tuned = _tuned(gpu).get(key)
    return tuned or default_blocks(k, tokens)


def default_blocks(k: int, tokens: int) -> Blocks:
    """Return sizes that compile without spills and run on every GPU from sm_80 on."""
    if tokens > DECODE_TOKENS:
        # A wide K (down's) needs more parts than a narrow one, or half of the multiprocessors would have no work.
        split = 1 if tokens > 4096 else max(4, min(8, k // (1024 if tokens <= 1024 else 2048)))
        split = max(1, min(split, k // (2 * PREFILL_BK)))
        return Blocks(bm=64, br=64, bk=PREFILL_BK, bn=128, be=64, split=split, stages=3, programs=2)
    # Few tokens make few tiles: more parts of K keep every multiprocessor busy.
    split = 16 if tokens <= 8 else 8 if tokens <= 64 else 4
    # At least two blocks in each part: for a loop that runs once the compiler emits loads that wait one by one.
    split = max(1, min(split, k // (2 * DECODE_BK)))
    # 40 KiB of shared memory and 128 registers let four programs share a multiprocessor. Without the limit Triton 3.6
    # takes up to 168 registers, and a quarter less is read at a time. Steps of up to 8 tokens would spill some at 128.
    registers = 168 if tokens <= 8 else 128
    return Blocks(bm=16, br=64, bk=DECODE_BK, bn=128, be=64, split=split, stages=3, programs=4, registers=registers)


@cache
def _tuned(gpu: str) -> dict[tuple[int, tuple[int, ...], int, int], Blocks]:
    for path in sorted(TABLES.glob("*.json")):
        table = msgspec.json.decode(path.read_bytes(), type=TuningTable)
        if table.gpu == gpu:
            return {(entry.k, entry.widths, entry.tokens, entry.rank): entry.blocks for entry in table.entries}
    logging.getLogger(__name__).warning(
        "no tuned block sizes for %s: using safe defaults; scripts/tune_kernels measures better ones", gpu
    )
    return {}
