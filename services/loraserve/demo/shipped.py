"""Provides the four demo adapters as PEFT directories of ranks 8, 16, 32 and 64.

The repository contains three of them at their full rank. The fourth is stored at a small rank, to keep the repository
small, and is expanded to rank 64 on the user's machine.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from loraserve.demo.paths import build_once
from loraserve.interrupts import hold_back_interrupts

SHIPPED_DIR = Path(__file__).parent / "adapters"
SHIPPED_RANKS = {"pirate": 8, "json": 16, "french": 32}
EXPANDED_NAME, EXPANDED_RANK, EXPANSION_SEED = "shout", 64, 64


class DemoAdapter(NamedTuple):
    name: str
    path: Path
    rank: int


def demo_adapters(data_dir: Path, progress: Callable[[str], None] = lambda line: None) -> list[DemoAdapter]:
    """Return the four adapters in order of rank. Raises ConfigError if the expanded adapter cannot be built."""
    served = [DemoAdapter(name, SHIPPED_DIR / name, rank) for name, rank in SHIPPED_RANKS.items()]
    return [*served, DemoAdapter(EXPANDED_NAME, expanded_adapter(data_dir, progress), EXPANDED_RANK)]


def expanded_adapter(data_dir: Path, progress: Callable[[str], None]) -> Path:
    """Return the folder of the expanded adapter. Builds it if it is missing or the shipped adapter has changed."""
    small = SHIPPED_DIR / EXPANDED_NAME
    digest = hashlib.sha256((small / "adapter_model.safetensors").read_bytes()).hexdigest()
    source = {"adapter": EXPANDED_NAME, "sha256": digest, "rank": EXPANDED_RANK, "seed": EXPANSION_SEED}

    def build(folder: Path) -> None:
        # Imported here because it imports torch, which is slow and not needed if the adapter exists.
        with hold_back_interrupts():
            from loraserve.demo.weights import expand_rank

        progress(f"expanding the adapter {EXPANDED_NAME} to rank {EXPANDED_RANK}")
        expand_rank(small, folder, EXPANDED_RANK, EXPANSION_SEED)

    return build_once(data_dir / "adapters" / f"{EXPANDED_NAME}-r{EXPANDED_RANK}", source, build, progress)
