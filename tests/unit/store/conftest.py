"""A store over a temporary folder and PEFT directories to register."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loraserve.adapter.pack import Slab, pack_peft
from loraserve.store.core import AdapterStore, StoreLimits
from loraserve.testing.peft_writer import TINY_SHAPE, named_tensors, random_pairs, write_peft

LIMITS = StoreLimits(served_model="base", max_rank=64, engine_max_rank=64, pool_bytes=1 << 20)


@pytest.fixture
def adapter_dir(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a PEFT directory for a seed and rank and returns its path."""

    def write(seed: int = 0, rank: int = 8) -> Path:
        tensors = named_tensors(random_pairs(TINY_SHAPE, rank, seed))
        return write_peft(tmp_path / f"adapter-{seed}-{rank}", tensors, r=rank)

    return write


@pytest.fixture
def make_slab(adapter_dir: Callable[..., Path]) -> Callable[..., Slab]:
    """Return a function that packs an adapter of a seed and rank."""
    return lambda seed=0, rank=8: pack_peft(adapter_dir(seed, rank), TINY_SHAPE, "bfloat16", 64)


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Callable[..., AdapterStore]]:
    """Return a function that opens the store in the test's folder. Opening again closes the previous one."""
    opened: list[AdapterStore] = []

    def open_again(now: float = 1000.0, limits: StoreLimits = LIMITS) -> AdapterStore:
        for store in opened:
            store.close()
        opened[:] = [AdapterStore(tmp_path / "data", TINY_SHAPE, "bfloat16", limits, now)]
        return opened[0]

    yield open_again
    for store in opened:
        store.validate()
        store.close()
