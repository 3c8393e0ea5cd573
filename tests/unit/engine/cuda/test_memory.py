"""How a GPU's memory is divided and described, and the adapter pool in it."""

import hashlib
import random
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraserve.adapter.format import SlabHeader, make_layout, make_uniform_layout
from loraserve.config import EngineConfig
from loraserve.engine.adapters.pool import AdapterPool
from loraserve.engine.cuda import memory as memory_module
from loraserve.engine.cuda.memory import (
    MIB,
    DevicePool,
    MeasuredMemory,
    MemoryShares,
    count_fitting_adapters,
    describe_capacity,
    divide_memory,
)
from loraserve.engine.cuda.state import DTYPES, compute_dtype
from loraserve.errors import ConfigError
from loraserve.messages import AdapterRef
from loraserve.model_shape import MODULES, SLICES, ModelShape

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = {
    "odd": ModelShape(layers=2, hidden=72, heads=3, kv_heads=1, head_dim=24, ffn=106, vocab=50),
    "even": ModelShape(layers=3, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=112, vocab=50),
}
GIB = 1 << 30


def measured(total: int, used: int, step: int) -> MeasuredMemory:
    return MeasuredMemory(total_bytes=total, used_bytes=used, step_bytes=step)


def test_the_pool_gets_its_fraction_and_the_cache_the_rest() -> None:
    shares = divide_memory(measured(80 * GIB, 20 * GIB, 2 * GIB), 0.9, 0.3, 1 << 20)
    assert shares == MemoryShares(kv_blocks=35 << 10, pool_bytes=15 * GIB)


@given(
    total=st.integers(0, 200 * GIB),
    used=st.integers(0, 200 * GIB),
    step=st.integers(0, 20 * GIB),
    memory_fraction=st.floats(0.01, 0.99),
    pool_fraction=st.floats(0.01, 0.99),
    block_bytes=st.integers(1, 64 * MIB),
)
def test_no_more_memory_is_used_than_allowed(
    total: int, used: int, step: int, memory_fraction: float, pool_fraction: float, block_bytes: int
) -> None:
    left = total * memory_fraction - used - step
    try:
        shares = divide_memory(measured(total, used, step), memory_fraction, pool_fraction, block_bytes)
    except ConfigError:
        assert left * pool_fraction < MIB + 1 or left * (1 - pool_fraction) < block_bytes + 1, "there was room"
        return
    taken = shares.pool_bytes + shares.kv_blocks * block_bytes
    assert left - block_bytes - 1 < taken <= left, "all of it, but for a part of a block"
    assert shares.pool_bytes <= left * pool_fraction
    assert shares.pool_bytes % MIB == 0
    assert min(shares.kv_blocks, shares.pool_bytes) > 0


@pytest.mark.parametrize(
    ("memory", "block_bytes"),
    [
        (measured(8 * GIB, 9 * GIB, GIB), 1),  # more than is allowed is used already
        (measured(8 * GIB, int(7.2 * GIB) - 3 * MIB, 0), 1),  # not a MiB for the pool
        (measured(8 * GIB, 7 * GIB, 0), GIB),  # not one block
    ],
)
def test_too_little_memory_is_refused_with_settings_and_remedies(memory: MeasuredMemory, block_bytes: int) -> None:
    with pytest.raises(ConfigError) as refused:
        divide_memory(memory, 0.9, 0.3, block_bytes)
    text = str(refused.value)
    assert f"engine.memory_fraction=0.9 of 8192 MiB allows 7373 MiB, {memory.used_bytes / MIB:.0f} MiB are used" in text
    assert f"a step takes {memory.step_bytes / MIB:.0f} MiB" in text
    for remedy in ("raise engine.memory_fraction", "lower engine.max_step_tokens", "a GPU of its own", "smaller model"):
        assert remedy in text


def full_slab(shape: ModelShape, dtype: str, rank: int) -> SlabHeader:
    ranks = [(rank,) * len(SLICES[module]) for _ in range(shape.layers) for module in MODULES]
    return make_layout(shape, dtype, ranks, [(1.0,) * len(row) for row in ranks])  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("rank", [1, 7, 64])
def test_a_uniform_layout_has_the_size_of_a_slab(shape: ModelShape, dtype: str, rank: int) -> None:
    assert make_uniform_layout(shape, dtype, rank).slab_bytes == full_slab(shape, dtype, rank).slab_bytes  # type: ignore[arg-type]


def count_placed(shape: ModelShape, pool_bytes: int, slots: int, rank: int) -> int:
    """Return how many adapters the engine's pool places without evicting one."""
    pool = AdapterPool(pool_bytes, slots)
    size = full_slab(shape, "bfloat16", rank).slab_bytes
    for n in count():
        adapter = AdapterRef(name=str(n), version=str(n), rank=rank, slab_bytes=size)
        if n == slots or pool.place(adapter, float(n)) is None:
            return n
    raise AssertionError


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("pool_bytes", [0, 4095, 100_000, 1 << 20, 3_333_333])
@pytest.mark.parametrize("rank", [1, 8, 16, 100])
def test_the_count_of_fitting_adapters_is_the_pools(shape: ModelShape, pool_bytes: int, rank: int) -> None:
    fit = count_fitting_adapters(make_uniform_layout(shape, "bfloat16", rank).slab_bytes, pool_bytes, 20)
    assert fit == count_placed(shape, pool_bytes, 20, rank)


def test_slots_limit_the_count() -> None:
    assert count_fitting_adapters(make_uniform_layout(SHAPES["even"], "bfloat16", 8).slab_bytes, 1 << 30, 3) == 3


def test_the_capacity_is_described() -> None:
    shape, shares = SHAPES["even"], MemoryShares(kv_blocks=1000, pool_bytes=2 * MIB)
    sizes = {rank: make_uniform_layout(shape, "bfloat16", rank).slab_bytes for rank in (8, 128)}
    eight, large = (count_fitting_adapters(size, 2 * MIB, 64) for size in sizes.values())
    assert 64 > eight > large > 0
    assert describe_capacity(shares, 16, 64, sizes) == (
        f"KV cache for 16000 tokens; adapter pool of 2 MiB holds {eight} of rank 8, {large} of rank 128"
    )


@pytest.mark.parametrize(("dtype", "elements"), [(torch.bfloat16, 50), (torch.float32, 25)])
@pytest.mark.parametrize("read_bytes", [7, 20, 1 << 20])
def test_data_written_to_the_pool_is_read_back(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, elements: int, read_bytes: int
) -> None:
    monkeypatch.setattr(memory_module, "READ_BYTES", read_bytes)
    pool = DevicePool(elements, dtype, DEVICE)
    assert (len(pool), pool.on_device) == (100, True)
    data = bytes(range(1, 41))
    for kind, offset in ((bytes, 0), (bytearray, 41), (memoryview, 60)):
        pool.write(offset, kind(data))
    assert bytes(pool.tensor.view(torch.uint8).tolist()) == data + bytes(1) + data[:19] + data
    for offset, length in ((0, 100), (60, 40), (3, 21), (99, 1)):
        digest = hashlib.sha256(b"header")
        pool.digest(digest, offset, length)
        expected = hashlib.sha256(b"header" + bytes(pool.tensor.view(torch.uint8).tolist())[offset : offset + length])
        assert digest.digest() == expected.digest(), (offset, length)
        into = bytearray(length)
        pool.read_into(offset, memoryview(into))
        assert into == bytes(pool.tensor.view(torch.uint8).tolist())[offset : offset + length]


@pytest.mark.parametrize("read_bytes", [7, 1 << 20])
def test_the_pool_is_copied_into_host_memory(monkeypatch: pytest.MonkeyPatch, read_bytes: int) -> None:
    monkeypatch.setattr(memory_module, "READ_BYTES", read_bytes)
    data = random.Random(0).randbytes(100)
    pool, into = DevicePool(50, torch.bfloat16, DEVICE), bytearray(44)
    pool.write(0, data)
    pool.read_into(31, memoryview(into)[2:42])
    assert bytes(into) == bytes(2) + data[31:71] + bytes(2)


def test_threads_read_different_parts_concurrently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "READ_BYTES", 1000)
    pool = DevicePool(200_000, torch.bfloat16, DEVICE)
    pool.warm_up(4096, readers=2)
    assert not pool.tensor.any()
    data = random.Random(0).randbytes(400_000)
    pool.write(0, data)

    def found(part: int) -> bytes:
        digest = hashlib.sha256()
        pool.digest(digest, part * 10_000, 10_000)
        return digest.digest()

    with ThreadPoolExecutor(4) as threads:
        digests = list(threads.map(found, range(40)))
    assert digests == [hashlib.sha256(data[at : at + 10_000]).digest() for at in range(0, 400_000, 10_000)]


@pytest.mark.parametrize(
    ("weights", "slab_dtype", "taken"),
    [
        ("auto", "bfloat16", "bf16"),
        ("auto", "float16", "fp16"),
        ("auto", "float32", "float32"),
        ("bf16", "bfloat16", "bf16"),
        ("fp16", "float16", "fp16"),
        ("float32", "float32", "float32"),
    ],
)
def test_weights_have_the_adapters_dtype(weights: str, slab_dtype: str, taken: str) -> None:
    engine = EngineConfig(weights=weights, slab_dtype=slab_dtype)  # type: ignore[arg-type]
    assert compute_dtype(engine) == taken
    assert str(DTYPES[taken]) == f"torch.{slab_dtype}"


@pytest.mark.parametrize(
    ("weights", "needed", "slab_dtype"),
    [("bf16", "bfloat16", "float16"), ("fp16", "float16", "bfloat16"), ("float32", "float32", "bfloat16")],
)
def test_differing_dtypes_are_refused_with_both_settings(weights: str, needed: str, slab_dtype: str) -> None:
    text = (
        rf"engine\.weights={weights} needs engine\.slab_dtype={needed} on a GPU, it is {slab_dtype}; "
        r"set both alike, or engine\.weights=auto"
    )
    with pytest.raises(ConfigError, match=text):
        compute_dtype(EngineConfig(weights=weights, slab_dtype=slab_dtype))  # type: ignore[arg-type]
