"""Block sizes of the GPU kernels: measured on a GPU by scripts/tune_kernels, safe everywhere else.

A table is keyed by module (K and the widths of its slices), bucket of tokens and bucket of ranks, because those are
what decides which sizes are fast; it carries the name of the GPU it was measured on and is used on that alone.
"""

import logging
from functools import cache
from pathlib import Path

import msgspec

DECODE_TOKENS = 256
"""Steps of up to this many tokens run the one-launch kernel."""
DECODE_BK, PREFILL_BK = 128, 64
TOKEN_BUCKETS = (8, 32, 64, 128, 256, 1024, 4096, 1 << 30)
RANK_BUCKETS = (16, 64, 256)
TABLES = Path(__file__).parent / "tuned"


class Blocks(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes of one launch. ``bm`` tokens x ``br`` rows x ``bk`` of K, ``bn`` outputs x ``be`` ranks.

    ``split`` parts of K run side by side; ``programs`` is the fixed grid, per multiprocessor. A thread of the
    one-launch kernel has at most ``registers``, of which there are 65536 for the programs that a multiprocessor holds.
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


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """The fastest blocks found for one case, and its time as a multiple of the memory floor."""

    k: int
    widths: tuple[int, ...]
    tokens: int
    rank: int
    blocks: Blocks
    floor_ratio: float


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was measured on one kind of GPU, with the command and the date."""

    gpu: str
    command: str
    date: str
    entries: tuple[Entry, ...]


def bucket(value: int, buckets: tuple[int, ...]) -> int:
    """The least bucket that holds ``value``; the last where none does."""
    return next((limit for limit in buckets if value <= limit), buckets[-1])


def pick(gpu: str, k: int, widths: tuple[int, ...], tokens: int, rank: int) -> Blocks:
    """Blocks for a step of ``tokens`` tokens whose largest rank is ``rank``."""
    key = (k, widths, bucket(tokens, TOKEN_BUCKETS), bucket(rank, RANK_BUCKETS))
    tuned = _tuned(gpu).get(key)
    return tuned or default_blocks(k, tokens)


def default_blocks(k: int, tokens: int) -> Blocks:
    """Sizes that compile without spills and run everywhere from sm_80 on."""
    if tokens > DECODE_TOKENS:
        # A wide K (down's) in as few parts as a narrow one would leave half of the multiprocessors without any.
        split = 1 if tokens > 4096 else max(4, min(8, k // (1024 if tokens <= 1024 else 2048)))
        split = max(1, min(split, k // (2 * PREFILL_BK)))
        return Blocks(bm=64, br=64, bk=PREFILL_BK, bn=128, be=64, split=split, stages=3, programs=2)
    # Few tokens are few tiles: more parts of K keep every multiprocessor busy.
    split = 16 if tokens <= 8 else 8 if tokens <= 64 else 4
    # At least two blocks in each: of a loop that runs once the compiler makes loads that are waited for one by one.
    split = max(1, min(split, k // (2 * DECODE_BK)))
    # 40 KiB of shared memory and 128 registers: four programs fit a multiprocessor. Left alone, Triton 3.6's compiler
    # takes up to 168, and a quarter less is read at a time. Of eight tokens or fewer it would spill some.
    registers = 168 if tokens <= 8 else 128
    return Blocks(bm=16, br=64, bk=DECODE_BK, bn=128, be=64, split=split, stages=3, programs=4, registers=registers)


@cache
def _tuned(gpu: str) -> dict[tuple[int, tuple[int, ...], int, int], Blocks]:
    for path in sorted(TABLES.glob("*.json")):
        table = msgspec.json.decode(path.read_bytes(), type=Table)
        if table.gpu == gpu:
            return {(entry.k, entry.widths, entry.tokens, entry.rank): entry.blocks for entry in table.entries}
    logging.getLogger(__name__).warning(
        "no tuned kernel sizes for %s: safe defaults are used; scripts/tune_kernels measures better ones", gpu
    )
    return {}
