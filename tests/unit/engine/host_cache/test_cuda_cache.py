"""The host cache behind a pool on a device; on a GPU its memory is page-locked."""

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
import torch

from loraserve.adapter.format import make_uniform_layout, seal_layout, slab_version
from loraserve.engine.adapters.lifecycle import LoadedSlab
from loraserve.engine.cuda.memory import DevicePool, page_locked
from loraserve.engine.host_cache.cache import HostCache
from loraserve.engine.host_cache.tier import CacheTier
from loraserve.engine.loading.memory import TransferTarget
from loraserve.engine.loading.speeds import FROM_STORE, LinkSpeeds
from loraserve.engine.schedule.events import LeftSlab
from loraserve.messages import AdapterRef
from loraserve.model_shape import ModelShape
from loraserve.testing.clock import FakeClock

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
CACHE_BYTES = 1 << 20
LAYOUT = make_uniform_layout(ModelShape(2, 64, 2, 1, 32, 96, 64), "bfloat16", 8)


def test_a_slab_goes_from_the_device_to_host_memory_and_back(capfd: pytest.CaptureFixture[str]) -> None:
    data = random.Random(3).randbytes(LAYOUT.slab_bytes)
    header = seal_layout(LAYOUT, data)
    ref = AdapterRef(name="one", version=slab_version(header), rank=8, slab_bytes=header.slab_bytes)
    pool = DevicePool(1 << 19, torch.bfloat16, DEVICE)
    pool.write(4096, data)
    back = bytearray(len(data))

    async def scenario(tier: CacheTier) -> None:
        saving = tier.keep(LeftSlab(ref, 4096), LoadedSlab(header, FROM_STORE, 0.1))
        assert saving is not None
        await saving
        pool.write(4096, bytes(len(data)))
        source = await tier.find(ref)
        assert source is not None
        assert tier.memory is not None
        assert torch.frombuffer(tier.memory.view(0, CACHE_BYTES), dtype=torch.uint8).is_pinned() is ON_GPU
        await source.open(ref)
        with ThreadPoolExecutor(1) as threads:
            await source.copy(ref, TransferTarget(pool, 8192, len(data), lambda arrived_bytes: None, threads))
        source.close(None)
        pool.read_into(8192, memoryview(back))

    with closing(CacheTier(HostCache(CACHE_BYTES), CACHE_BYTES, pool, FakeClock(), LinkSpeeds())) as tier:
        asyncio.run(scenario(tier))
    assert bytes(back) == data
    assert ("host_cache_page_locked" if ON_GPU else "host_cache_not_page_locked") in capfd.readouterr().out


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU")
def test_memory_is_page_locked_for_as_long_as_it_is_wanted() -> None:
    memory = memoryview(bytearray(1 << 16))
    pool = DevicePool(16, torch.bfloat16, DEVICE)
    for _ in range(2):
        with page_locked(memory, pool):
            assert torch.frombuffer(memory, dtype=torch.uint8).is_pinned()
        assert not torch.frombuffer(memory, dtype=torch.uint8).is_pinned()
