"""The steps that are timed: which adapter each token uses, and of which ranks the adapters are."""

from collections.abc import Iterator

import msgspec

from loraserve.kernels.lora.batch import NO_ADAPTER
from loraserve.model_shape import ModelShape

LLAMA_3_8B = ModelShape(layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocab=128256)
LAYERS = 8
"""Of weights, used in turn: those of one layer would stay in the L2 cache from one pass to the next."""
MIX = (8, 16, 32, 64, 128)
MIXED_64 = tuple(MIX[slot % len(MIX)] for slot in range(64))
"""Ranks of 64 resident adapters; they sum to 3096."""
SMALL, LARGE = MIX[0], MIX[-1]


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """A step. ``slots`` has one entry a token, NO_ADAPTER for none; a slot is a place in the residents' ``ranks``."""

    name: str
    slots: tuple[int, ...]
    ranks: tuple[int, ...] = MIXED_64

    @property
    def tokens(self) -> int:
        return len(self.slots)

    @property
    def used_ranks(self) -> list[int]:
        """Ranks of the adapters of this step, each once."""
        return [self.ranks[slot] for slot in sorted(set(self.slots)) if slot != NO_ADAPTER]


def decode(tokens: int, adapters: int, ranks: tuple[int, ...] = MIXED_64) -> Case:
    """One token of each sequence; sequences take turns over the first ``adapters`` adapters."""
    slots = tuple(token % adapters for token in range(tokens))
    return Case(name=f"decode {tokens}x{adapters}", slots=slots, ranks=ranks)


def prefill(sequences: int, tokens: int, ranks: tuple[int, ...] = MIXED_64) -> Case:
    """Prompts of ``tokens`` tokens side by side, each of its own adapter."""
    slots = tuple(sequence for sequence in range(sequences) for _ in range(tokens))
    return Case(name=f"prefill {sequences}x{tokens}", slots=slots, ranks=ranks)


DECODE_64X64, DECODE_64X8, PREFILL = decode(64, 64), decode(64, 8), prefill(8, 512)
QUICK = (DECODE_64X64, DECODE_64X8, PREFILL)
GRID = (DECODE_64X64, DECODE_64X8, decode(8, 8), decode(1, 1), decode(256, 64), PREFILL)

ALL_SMALL = Case(name="decode 64 rank 8", slots=tuple(range(64)), ranks=(SMALL,) * 64)
HALF_LARGE = Case(
    name="decode 32 rank 8 + 32 rank 128",
    slots=tuple(range(64)),
    ranks=tuple(SMALL if slot % 2 == 0 else LARGE for slot in range(64)),
)
ALL_LARGE = Case(name="decode 64 rank 128", slots=tuple(range(64)), ranks=(LARGE,) * 64)
"""Nothing to gain from knowing ranks: the best case of kernels that pad to the largest."""


def sweep() -> Iterator[Case]:
    """1 to 4096 tokens over 1, 8 and 64 adapters; from 512 tokens on they lie together, as prompts do."""
    for tokens in (1 << power for power in range(13)):
        for adapters in (1, 8, 64):
            if adapters <= tokens:
                yield decode(tokens, adapters) if tokens < 512 else prefill(adapters, tokens // adapters)
