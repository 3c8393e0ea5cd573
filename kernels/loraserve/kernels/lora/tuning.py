"""Block sizes of the GPU kernels: tuned sizes for measured GPUs, safe defaults for all others.

scripts/tune_kernels measures the sizes and writes a table. The key of an entry is a module's input width K and slice
widths, a bucket of tokens and a bucket of ranks. A table applies only to GPUs with the name of the measured GPU.
"""

import logging
from functools import cache
from pathlib import Path

import msgspec

DECODE_TOKENS = 256
"""Steps of up to this many tokens use the single-launch kernel in decode.py."""
DECODE_BK, PREFILL_BK = 128, 64
TOKEN_BUCKETS = (8, 32, 64, 128, 256, 1024, 4096, 1 << 30)
RANK_BUCKETS = (16, 64, 256)
TABLES = Path(__file__).parent / "tuned"


class Blocks(msgspec.Struct, frozen=True, kw_only=True):
    """Block sizes of the kernels for one module.

    Shrink computes blocks of ``bm`` tokens x ``br`` rows of A in steps of ``bk`` inputs, with K split into ``split``
    parallel parts. Expand computes ``bm`` tokens x ``bn`` outputs in steps of ``be`` ranks. ``programs`` is the number
    of programs per multiprocessor. ``registers`` limits each thread of the single-launch kernel.
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
    """The fastest blocks for one key. ``floor_ratio`` is the kernel's time divided by the time to read the weights."""

    k: int
    widths: tuple[int, ...]
    tokens: int
    rank: int
    blocks: Blocks
    floor_ratio: float


class TuningTable(msgspec.Struct, frozen=True, kw_only=True):
    """All measurements on one GPU model, with the command and the date of the measurement."""

    gpu: str
    command: str
    date: str
    entries: tuple[TunedBlocks, ...]


def bucket(value: int, buckets: tuple[int, ...]) -> int:
    """Return the smallest of the ascending ``buckets`` that is at least ``value``, or the last bucket."""
    return next((limit for limit in buckets if value <= limit), buckets[-1])


def pick(gpu: str, k: int, widths: tuple[int, ...], tokens: int, rank: int) -> Blocks:
    """Return a module's block sizes for steps of ``tokens`` tokens and adapters of ranks up to ``rank``."""
    key = (k, widths, bucket(tokens, TOKEN_BUCKETS), bucket(rank, RANK_BUCKETS))
    tuned = _tuned(gpu).get(key)
    return tuned or default_blocks(k, tokens)


def default_blocks(k: int, tokens: int) -> Blocks:
    """Return block sizes that compile without register spills and run on GPUs from sm_80 on."""
    if tokens > DECODE_TOKENS:
        # A large K, as in the down module, needs more parts to give every multiprocessor work.
        split = 1 if tokens > 4096 else max(4, min(8, k // (1024 if tokens <= 1024 else 2048)))
        split = max(1, min(split, k // (2 * PREFILL_BK)))
        return Blocks(bm=64, br=64, bk=PREFILL_BK, bn=128, be=64, split=split, stages=3, programs=2)
    # Few tokens make few tiles. More parts of K keep every multiprocessor busy.
    split = 16 if tokens <= 8 else 8 if tokens <= 64 else 4
    # Each part has at least two blocks. The compiler does not pipeline the loads of a loop that runs once.
    split = max(1, min(split, k // (2 * DECODE_BK)))
    # With 40 KiB of shared memory and 128 registers, four programs share a multiprocessor. Without the limit Triton 3.6
    # uses up to 168 registers, and only three fit. Steps of up to 8 tokens would spill registers at 128.
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
