"""How a GPU's memory is divided, before anything of it is taken. Pure."""

from collections.abc import Sequence

import msgspec

from loraserve.adapter.format import Dtype, lay_out_uniform
from loraserve.engine.extents import ExtentAllocator
from loraserve.errors import ConfigError
from loraserve.model_shape import ModelShape

SHOWN_RANKS = (8, 16, 64, 128)
MIB = 1 << 20


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """The GPU once the weights are loaded: ``used_bytes`` counts everybody's, ``step_bytes`` what a step takes more."""

    total_bytes: int
    used_bytes: int
    step_bytes: int


class Shares(msgspec.Struct, frozen=True, kw_only=True):
    """What the cache and the pool get."""

    kv_blocks: int
    pool_bytes: int


def divide(memory: Measured, memory_fraction: float, pool_fraction: float, block_bytes: int) -> Shares:
    """``memory_fraction`` of the GPU may be used; of what weights and steps leave, ``pool_fraction`` is the pool's.

    Raises ConfigError with the setting to change where not one KV block or no pool is left.
    """
    allowed = int(memory.total_bytes * memory_fraction)
    left = allowed - memory.used_bytes - memory.step_bytes
    pool_bytes = int(left * pool_fraction) // MIB * MIB
    kv_blocks = (left - pool_bytes) // block_bytes if left > 0 else 0
    if pool_bytes < MIB or kv_blocks < 1:
        raise ConfigError(
            f"GPU memory: engine.memory_fraction={memory_fraction:g} of {memory.total_bytes / MIB:.0f} MiB allows "
            f"{allowed / MIB:.0f} MiB, {memory.used_bytes / MIB:.0f} MiB are used (weights, and whatever else runs on "
            f"this GPU) and a step takes {memory.step_bytes / MIB:.0f} MiB, which leaves no room for the KV cache and "
            "the adapter pool; raise engine.memory_fraction, lower engine.max_step_tokens, give each engine a GPU of "
            "its own, or use a smaller model"
        )
    return Shares(kv_blocks=kv_blocks, pool_bytes=pool_bytes)


def adapter_bytes(shape: ModelShape, dtype: Dtype, rank: int) -> int:
    """Slab of an adapter with this rank in every projection."""
    return lay_out_uniform(shape, dtype, rank).slab_bytes


def adapters_that_fit(shape: ModelShape, dtype: Dtype, pool_bytes: int, slots: int, rank: int) -> int:
    """How many adapters of this rank the pool holds at a time, as extents are given out."""
    extents = ExtentAllocator(pool_bytes)
    wanted = adapter_bytes(shape, dtype, rank)
    count = 0
    while count < slots and extents.allocate(wanted) is not None:
        count += 1
    return count


def room(
    shape: ModelShape, dtype: Dtype, shares: Shares, block_tokens: int, slots: int, ranks: Sequence[int] = SHOWN_RANKS
) -> str:
    """For the log: how many tokens and how many adapters fit."""
    tokens = shares.kv_blocks * block_tokens
    counts = ", ".join(
        f"{adapters_that_fit(shape, dtype, shares.pool_bytes, slots, rank)} of rank {rank}" for rank in ranks
    )
    return f"KV cache for {tokens} tokens; adapter pool of {shares.pool_bytes / MIB:.0f} MiB holds {counts}"
