"""An engine whose pool lies in GPU memory: its offers, and its reads from peers directly into the pool."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import pytest

from loraserve.config import Config, TransferConfig
from loraserve.engine.lending.lender import MemoryOffers
from loraserve.engine.loading.memory import TransferTarget
from loraserve.engine.loading.sources import PeerTransports
from loraserve.messages import ReadRegion
from loraserve.messages.transfer import CudaIpcHandle, TcpHandle
from loraserve.testing.gpu_owner import GpuOwner, from_gpu, to_gpu
from loraserve.testing.memory_bus import MemoryNetwork
from loraserve.testing.memory_owner import pattern
from loraserve.transfer.cuda_driver import GpuMemory, allocate, call, current_device, free
from loraserve.transfer.protocol import ByteRange, TransferError
from loraserve.transfer.tcp import TcpReader

MIB = 1 << 20
LENGTH = 20 * MIB
SLAB = 9 * MIB
START, AT = MIB + 7, 3 * MIB
TIMEOUT_S = 20.0
CONFIG = Config(transfer=TransferConfig(transports=("cuda_ipc", "shm", "tcp")))


class GpuPool:
    """A pool without torch, so that it can lie in the memory of the fake driver's GPU."""

    on_device = True

    def __init__(self) -> None:
        self.memory: GpuMemory | None = allocate(LENGTH, 0)
        self.gpu = self.memory
        to_gpu(self.gpu, np.zeros(LENGTH, np.uint8))

    def __len__(self) -> int:
        return LENGTH

    def view(self, offset_bytes: int, length_bytes: int) -> None:
        return None

    def write(self, offset_bytes: int, data: memoryview | bytes | bytearray) -> None:
        to_gpu(GpuMemory(self.gpu.address + offset_bytes, len(data)), np.frombuffer(data, np.uint8))

    def read_into(self, offset_bytes: int, into: memoryview) -> None:
        with current_device(0):
            target = np.frombuffer(into, np.uint8).ctypes.data
            call("cuMemcpyDtoH_v2", target, self.gpu.address + offset_bytes, into.nbytes)

    def digest(self, *_: object) -> None:
        raise AssertionError("no digest was expected")


@pytest.fixture
def pool(driver: str) -> Iterator[GpuPool]:
    pool = GpuPool()
    yield pool
    free(pool.gpu)


def play(scenario: Callable[[MemoryNetwork], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(2 * TIMEOUT_S):
            await scenario(MemoryNetwork())

    asyncio.run(main())


def test_a_pool_on_a_gpu_is_offered_over_cuda_ipc_and_tcp(pool: GpuPool) -> None:
    async def scenario(network: MemoryNetwork) -> None:
        bus = network.bus("engine-0", ReadRegion)
        offers = MemoryOffers(bus, CONFIG, pool)
        ipc, tcp = offers.handles
        assert isinstance(ipc, CudaIpcHandle)
        assert isinstance(tcp, TcpHandle)
        assert (ipc.length_bytes, tcp.length_bytes, ipc.offset_bytes) == (LENGTH, LENGTH, 0)
        assert (offers.abilities.transports, offers.abilities.device) == (("cuda_ipc", "tcp"), "cuda")
        pool.write(5, pattern(MIB).data)

        async def serve() -> None:
            while True:
                later = offers.answer_read(await bus.receive())
                assert later is not None, "GPU memory was not read in a thread"
                await later

        serving = asyncio.create_task(serve())
        into = bytearray(MIB)
        await TcpReader(network.bus("engine-1", None), TIMEOUT_S).read(tcp, [ByteRange(5, MIB)], memoryview(into))
        assert into == pattern(MIB).tobytes()
        serving.cancel()
        offers.close()

    play(scenario)


def test_a_peers_slab_is_read_directly_into_the_pool(pool: GpuPool) -> None:
    async def scenario(network: MemoryNetwork) -> None:
        arrived: list[int] = []
        with GpuOwner(LENGTH) as owner, ThreadPoolExecutor(1) as writers:
            readers = PeerTransports(network.bus("engine-1", None), pool, None)
            target = TransferTarget(pool, AT, SLAB, arrived.append, writers)
            for _ in range(2):
                await readers.copy(owner.handle, START, target)
            assert arrived == [SLAB, SLAB]
            found = from_gpu(pool.gpu)
            assert (found[AT : AT + SLAB] == pattern(LENGTH)[START : START + SLAB]).all()
            assert not found[:AT].any()
            assert not found[AT + SLAB :].any()
            with pytest.raises(TransferError, match="out_of_range"):
                await readers.copy(owner.handle, LENGTH - SLAB + 1, target)
            owner.kill()
            with pytest.raises(TransferError, match="gone"):
                await readers.copy(owner.handle, START, target)
            assert arrived == [SLAB, SLAB]
            readers.close()

    play(scenario)


def test_a_pool_outside_of_gpu_memory_uses_no_cuda_ipc(pool: GpuPool) -> None:
    async def scenario(network: MemoryNetwork) -> None:
        with GpuOwner(LENGTH) as owner, ThreadPoolExecutor(1) as writers:
            pool.memory = None
            readers = PeerTransports(network.bus("engine-1", None), pool, None)
            with pytest.raises(TransferError, match=r"refused.*not offered here"):
                await readers.copy(owner.handle, START, TransferTarget(pool, AT, SLAB, print, writers))
            without = msgspec.structs.replace(CONFIG, transfer=TransferConfig(transports=("cuda_ipc",)))
            offers = MemoryOffers(network.bus("engine-0", None), without, pool)
            assert (offers.handles, offers.abilities.transports, offers.abilities.device) == ((), (), "cpu")

    play(scenario)
