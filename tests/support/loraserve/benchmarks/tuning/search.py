"""Which block sizes the tuner tries, for which entries of the table, and in which order. Nothing here uses a device.

The search is a coordinate descent: from sizes that are known to work, it sets one field after the other to the best of
a few values, until a round changes nothing. The fields hardly depend on each other (shrink's, expand's and the grid's),
so about 40 of some 100,000 combinations come close to the best. A full search would take days for each kind of GPU.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

import msgspec

from loraserve.benchmarks.lora.cases import MIX, LoraCase, decode_case, prefill_case
from loraserve.kernels.lora.tuning import DECODE_TOKENS, RANK_BUCKETS, TOKEN_BUCKETS, Blocks
from loraserve.model_shape import MODULES, ModelShape

Options = Mapping[str, tuple[int, ...]]

RESIDENTS = 64
BY_WEIGHT = (64, 8, 256, 4096, 32, 128, 1024, 1 << 30)
"""Token buckets, the most important first: the time may not suffice for all."""
MOST_TOKENS = 16384
"""Stands for the last bucket, which has no upper end."""
DECODE: Options = {
    "split": (1, 2, 4, 8, 16, 32),
    "bk": (64, 128, 256, 512),
    "br": (16, 32, 64),
    "programs": (1, 2, 3, 4, 6),
    "registers": (128, 168),
    "bn": (64, 128, 256),
    "be": (16, 32, 64, 128),
    "warps": (4, 8),
    "stages": (2, 3, 4),
    "bm": (16, 32),
}
PREFILL: Options = {
    "bm": (32, 64, 128),
    "bn": (64, 128, 256),
    "be": (32, 64, 128),
    "warps": (4, 8),
    "split": (1, 2, 4, 8),
    "bk": (32, 64, 128),
    "br": (16, 32, 64, 128),
    "programs": (1, 2, 3, 4),
    "stages": (2, 3, 4),
}
SKIPPED = float("inf")
"""The score of sizes that do not compile, that spill, or that do not fit."""

assert set(BY_WEIGHT) == set(TOKEN_BUCKETS), "every bucket must be in the order"


class TuningTarget(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the table: a module of a model shape, at a bucket of tokens and of ranks."""

    module: int
    k: int
    widths: tuple[int, ...]
    tokens: int
    rank: int

    @property
    def name(self) -> str:
        return f"{MODULES[self.module]}, up to {self.tokens} tokens, rank {self.rank}"


def targets(
    shape: ModelShape, tokens: Iterable[int] = TOKEN_BUCKETS, ranks: Iterable[int] = RANK_BUCKETS
) -> list[TuningTarget]:
    """Return the entries to measure, the most useful first: served steps have mixed ranks and mostly decode."""
    wanted = set(tokens)
    return [
        TuningTarget(
            module=module,
            k=shape.in_features(name),
            widths=shape.out_features(name),
            tokens=bucket,
            rank=rank,
        )
        for rank in sorted(ranks, reverse=True)
        for bucket in BY_WEIGHT
        if bucket in wanted
        for module, name in enumerate(MODULES)
    ]


def cases_of(target: TuningTarget) -> tuple[LoraCase, LoraCase]:
    """Return the steps that an entry is for: many adapters with few tokens, and few with many; ranks are mixed."""
    mix = [rank for rank in MIX if rank <= target.rank]
    ranks = tuple(mix[slot % len(mix)] for slot in range(RESIDENTS))
    tokens = min(target.tokens, MOST_TOKENS)
    if tokens <= DECODE_TOKENS:
        few = min(max(1, tokens // 8), RESIDENTS)
        return decode_case(tokens, min(tokens, RESIDENTS), ranks), decode_case(tokens, few, ranks)
    return prefill_case(8, tokens // 8, ranks), prefill_case(RESIDENTS, tokens // RESIDENTS, ranks)


def options_of(target: TuningTarget) -> Options:
    """Return the values to try for each field."""
    return DECODE if target.tokens <= DECODE_TOKENS else PREFILL


def descend(
    starts: Iterable[Blocks], options: Options, k: int, score: Callable[[Blocks], float], go_on: Callable[[], bool]
) -> dict[Blocks, float]:
    """Search from ``starts`` while ``go_on()``. Return the score of all blocks tried; the lowest is the best."""
    tried: dict[Blocks, float] = {}
    for start in starts:
        if start not in tried:
            tried[start] = score(start)
    best = min(tried, key=lambda blocks: tried[blocks])
    changed = True
    while changed:
        changed = False
        for field, values in options.items():
            for candidate in _variants(best, field, values, k):
                if not go_on():
                    return tried
                if candidate not in tried:
                    tried[candidate] = score(candidate)
            found = min(tried, key=lambda blocks: tried[blocks])
            changed, best = changed or found != best, found
    return tried


def _variants(blocks: Blocks, field: str, values: tuple[int, ...], k: int) -> Iterator[Blocks]:
    """Yield the variants without an empty part of K whose tiles every thread copies 128 bits at a time."""
    for value in values:
        candidate = msgspec.structs.replace(blocks, **{field: value})
        if (candidate.split == 1 or candidate.split * candidate.bk <= k) and copies_whole_vectors(candidate):
            yield candidate


def copies_whole_vectors(b: Blocks) -> bool:
    """Whether each tile has eight elements for every thread. Smaller tiles are copied in narrower pieces."""
    least = min(b.bm * b.bk, b.br * b.bk, b.be * b.bn, b.bm * b.be)
    return least >= 8 * 32 * b.warps
