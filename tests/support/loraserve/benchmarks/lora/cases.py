"""The steps that are timed, their memory floors, and which implementations are timed at which step."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from loraserve.kernels.lora.batch import NO_ADAPTER
from loraserve.model_shape import MODULES, ModelShape

LLAMA_3_8B = ModelShape(layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocab=128256)
LAYERS = 8
"""Layers of weights, used in turn. The weights of one layer would stay in the L2 cache between passes."""
MIX = (8, 16, 32, 64, 128)
MIXED_64 = tuple(MIX[slot % len(MIX)] for slot in range(64))
"""Ranks of 64 resident adapters. They sum to 3096."""
SMALL, LARGE = MIX[0], MIX[-1]
ITEM_BYTES = 2

OURS, VLLM_8, VLLM_128, VLLM_256 = "ours", "vllm_8", "vllm_128", "vllm_256"
SGLANG_V2, CSGMV = "sglang_v2", "sglang_csgmv"
PEERS = (VLLM_8, VLLM_128, VLLM_256, SGLANG_V2, CSGMV)


class LoraCase(msgspec.Struct, frozen=True, kw_only=True):
    """One step. ``slots`` has the slot of each token's adapter, or NO_ADAPTER; ``ranks`` the rank of each slot."""

    name: str
    slots: tuple[int, ...]
    ranks: tuple[int, ...] = MIXED_64

    @property
    def tokens(self) -> int:
        return len(self.slots)

    @property
    def used_ranks(self) -> list[int]:
        """The ranks of this step's adapters, each adapter once."""
        return [self.ranks[slot] for slot in sorted(set(self.slots)) if slot != NO_ADAPTER]


def decode_case(tokens: int, adapters: int, ranks: tuple[int, ...] = MIXED_64) -> LoraCase:
    """Return a step of one token per sequence. The sequences use the first ``adapters`` adapters in turn."""
    slots = tuple(token % adapters for token in range(tokens))
    return LoraCase(name=f"decode {tokens}x{adapters}", slots=slots, ranks=ranks)


def prefill_case(sequences: int, tokens: int, ranks: tuple[int, ...] = MIXED_64) -> LoraCase:
    """Return a step of prompts of ``tokens`` tokens, each with an adapter of its own."""
    slots = tuple(sequence for sequence in range(sequences) for _ in range(tokens))
    return LoraCase(name=f"prefill {sequences}x{tokens}", slots=slots, ranks=ranks)


DECODE_64X64, DECODE_64X8, PREFILL = decode_case(64, 64), decode_case(64, 8), prefill_case(8, 512)
GRID = (DECODE_64X64, DECODE_64X8, decode_case(8, 8), decode_case(1, 1), decode_case(256, 64), PREFILL)

ALL_SMALL = LoraCase(name="decode 64 rank 8", slots=tuple(range(64)), ranks=(SMALL,) * 64)
HALF_LARGE = LoraCase(
    name="decode 32 rank 8 + 32 rank 128",
    slots=tuple(range(64)),
    ranks=tuple(SMALL if slot % 2 == 0 else LARGE for slot in range(64)),
)
ALL_LARGE = LoraCase(name="decode 64 rank 128", slots=tuple(range(64)), ranks=(LARGE,) * 64)
"""Equal ranks: the best case of kernels that pad to the largest rank."""


def sweep() -> Iterator[LoraCase]:
    """Yield steps of 1 to 4096 tokens with 1, 8 and 64 adapters, from 512 tokens on as prompts."""
    for tokens in (1 << power for power in range(13)):
        for adapters in (1, 8, 64):
            if adapters <= tokens:
                yield decode_case(tokens, adapters) if tokens < 512 else prefill_case(adapters, tokens // adapters)


def module_bytes(shape: ModelShape, module: str, case: LoraCase) -> int:
    """Return the bytes that LoRA of one module must move.

    A and B of each adapter of the step are read once. For each token with an adapter x is read, y read and written.
    """
    k, out = shape.in_features(module), shape.out_features(module)
    tokens = sum(slot != NO_ADAPTER for slot in case.slots)
    weights = sum(case.used_ranks) * (len(out) * k + sum(out))
    return ITEM_BYTES * (weights + tokens * (k + 2 * sum(out)))


def layer_bytes(shape: ModelShape, case: LoraCase) -> int:
    """Return the bytes that LoRA of all modules of a layer must move."""
    return sum(module_bytes(shape, module, case) for module in MODULES)


def floor_ms(size_bytes: int, bytes_per_s: float) -> float:
    """Return the least time, in milliseconds, that moving these bytes takes."""
    return 1e3 * size_bytes / bytes_per_s


def program(quick: bool) -> Iterator[tuple[LoraCase, tuple[str, ...]]]:
    """Yield each case with the peers that are timed beside ours. Cases that share adapters follow each other."""
    if quick:
        yield DECODE_64X64, (VLLM_128, VLLM_256, SGLANG_V2)
        yield DECODE_64X8, ()
        yield PREFILL, ()
        yield ALL_SMALL, (VLLM_8,)
        yield HALF_LARGE, (VLLM_128,)
        return
    for case in GRID:
        yield case, (VLLM_128, *([VLLM_256] if case == DECODE_64X64 else []), SGLANG_V2, CSGMV)
    for case in sweep():
        yield case, ()
    yield ALL_SMALL, (VLLM_8, VLLM_128, SGLANG_V2)
    yield HALF_LARGE, (VLLM_128, SGLANG_V2)
    yield ALL_LARGE, (VLLM_128, SGLANG_V2)


def makers(peers: Path) -> dict[str, Callable[..., Any]]:
    """Return for each side the function that prepares it for (world, case).

    The number in a peer's name is the rank that it pads to. Imports triton: a caller may choose the interpreter first.
    """
    from loraserve.benchmarks.lora.peers.csgmv import Csgmv
    from loraserve.benchmarks.lora.peers.sglang_v2 import SglangV2
    from loraserve.benchmarks.lora.peers.vllm import Vllm
    from loraserve.benchmarks.lora.sides import Ours

    return {
        OURS: Ours,
        VLLM_8: lambda world, case: Vllm(peers, world, case, 8),
        VLLM_128: lambda world, case: Vllm(peers, world, case, 128),
        VLLM_256: lambda world, case: Vllm(peers, world, case, 256),
        SGLANG_V2: lambda world, case: SglangV2(peers, world, case, 128),
        CSGMV: lambda world, case: Csgmv(peers, world, case, 128),
    }
