"""The check without a GPU: every side once, in Triton's interpreter at a tiny size, against the definition."""

from collections.abc import Callable
from pathlib import Path

import torch

from loraserve.benchmarks.lora.cases import CSGMV, OURS, SGLANG_V2, LoraCase
from loraserve.benchmarks.lora.peers.csgmv import Csgmv
from loraserve.benchmarks.lora.peers.sglang_v2 import SglangV2
from loraserve.benchmarks.lora.peers.vllm import Vllm
from loraserve.benchmarks.lora.report import say
from loraserve.benchmarks.lora.sides import Ours, Side, World, largest_error
from loraserve.model_shape import ModelShape

TINY = ModelShape(layers=1, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=50)
CASE = LoraCase(name="self-check", slots=(0, 1, 2, 0, 3, 3, 2, 1, 0, 2), ranks=(8, 16, 32, 8))
MAX_RANK = 32


def use_few_blocks(side: Side) -> Side:
    """Choose the setting with the fewest blocks, because the interpreter runs them one after the other."""
    for setting in side.setting:
        setting.update({name: options[-1] for name, options in side.knobs.items() if name == "shrink"})
    return side


def errors(peers: Path) -> tuple[dict[str, float | None], dict[str, str]]:
    """Return the largest relative error of each side, and why others have none.

    In float16: the interpreter adds bfloat16 wrongly, which peers do and ours never does.
    """
    world = World(TINY, CASE.ranks, "cpu", torch.float16)
    makes: dict[str, Callable[[], Side]] = {
        OURS: lambda: Ours(world, CASE),
        "vllm": lambda: Vllm(peers, world, CASE, MAX_RANK),
        SGLANG_V2: lambda: SglangV2(peers, world, CASE, MAX_RANK),
        CSGMV: lambda: Csgmv(peers, world, CASE, MAX_RANK),
    }
    found: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    for name, make in makes.items():
        try:
            found[name] = error = largest_error(use_few_blocks(make()), world, CASE)
            say(f"{name}: largest error {error:.1e} of the largest element")
        except (ImportError, OSError) as problem:
            found[name] = None
            reasons[name] = f"{type(problem).__name__}: {problem}"
            say(f"{name}: {reasons[name]}")
    return found, reasons
