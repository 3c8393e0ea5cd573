"""Which sides are timed at which case, in an order in which one set of adapters serves many."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from loraserve.benchmarks.lora import cases
from loraserve.benchmarks.lora.cases import Case

OURS, VLLM_8, VLLM_128, VLLM_256 = "ours", "vllm_8", "vllm_128", "vllm_256"
SGLANG_V2, CSGMV = "sglang_v2", "sglang_csgmv"
PEERS = (VLLM_8, VLLM_128, VLLM_256, SGLANG_V2, CSGMV)


def program(quick: bool) -> Iterator[tuple[Case, tuple[str, ...]]]:
    """(case, peers that are timed beside ours)."""
    if quick:
        yield cases.DECODE_64X64, (VLLM_128, VLLM_256, SGLANG_V2)
        yield cases.DECODE_64X8, ()
        yield cases.PREFILL, ()
        yield cases.ALL_SMALL, (VLLM_8,)
        yield cases.HALF_LARGE, (VLLM_128,)
        return
    for case in cases.GRID:
        yield case, (VLLM_128, *([VLLM_256] if case == cases.DECODE_64X64 else []), SGLANG_V2, CSGMV)
    for case in cases.sweep():
        yield case, ()
    yield cases.ALL_SMALL, (VLLM_8, VLLM_128, SGLANG_V2)
    yield cases.HALF_LARGE, (VLLM_128, SGLANG_V2)
    yield cases.ALL_LARGE, (VLLM_128, SGLANG_V2)


def makers(peers: Path) -> dict[str, Callable[..., Any]]:
    """How each side is prepared for (world, case). The number is the rank that a peer pads to."""
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
