"""Reads over the bus from a device's pool, which the owner copies in a thread first. The device here may be a CPU."""

import asyncio
from collections.abc import Awaitable, Callable
from threading import Event

import numpy as np
import pytest
import torch

from loraserve.engine.compute.protocol import DeviceLostError
from loraserve.engine.cuda.memory import DevicePool
from loraserve.errors import PeerError
from loraserve.messages import ReadRegion, RegionChunk
from loraserve.messages.transfer import TRANSFER_PROTOCOL_VERSION
from loraserve.testing.memory_bus import MemoryNetwork
from loraserve.testing.memory_owner import pattern
from loraserve.transfer.protocol import ByteRange, TransferError
from loraserve.transfer.tcp import LONGEST_CHUNK_BYTES, ReadableRegion, TcpExporter, TcpReader

MIB = 1 << 20
LENGTH = 20 * MIB
TIMEOUT_S = 20.0
RANGES = [ByteRange(5, 10), ByteRange(LENGTH - 17 * MIB, 17 * MIB), ByteRange(0, 0), ByteRange(7, 1)]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Owner:
    """A process on the in-memory network whose region is read in a thread. ``answering`` has a task for each answer."""

    def __init__(self, network: MemoryNetwork, region: ReadableRegion) -> None:
        self.bus = network.bus("owner", ReadRegion)
        self.exporter = TcpExporter(self.bus)
        self.handle = self.exporter.register(region)
        self.answering: list[asyncio.Task[None]] = []
        self._serving = asyncio.create_task(self._serve())

    async def _serve(self) -> None:
        while True:
            later = self.exporter.answer(await self.bus.receive())
            if later is not None:
                self.answering.append(asyncio.create_task(later))


class Held:
    """A region whose reads set ``begun``, wait for ``may_end``, and then raise ``error`` if there is one."""

    def __init__(self, error: Exception | None = None) -> None:
        self.begun, self.may_end = Event(), Event()
        self._error = error

    def __len__(self) -> int:
        return MIB

    def read_into(self, offset_bytes: int, into: memoryview) -> None:
        self.begun.set()
        self.may_end.wait(TIMEOUT_S)
        if self._error is not None:
            raise self._error


def play(scenario: Callable[[MemoryNetwork], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(2 * TIMEOUT_S):
            await scenario(MemoryNetwork())

    asyncio.run(main())


def filled() -> DevicePool:
    pool = DevicePool(LENGTH // 2, torch.bfloat16, DEVICE)
    pool.write(0, pattern(LENGTH).data)
    return pool


async def until(event: Event) -> None:
    while not event.is_set():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


@pytest.mark.parametrize(("chunk_bytes", "in_flight"), [(MIB, 8), (LONGEST_CHUNK_BYTES, 2)])
def test_ranges_of_a_devices_pool_are_read(chunk_bytes: int, in_flight: int) -> None:
    async def scenario(network: MemoryNetwork) -> None:
        owner = Owner(network, filled())
        into = np.zeros(sum(each.length_bytes for each in RANGES), np.uint8)
        reader = TcpReader(network.bus("reader", None), TIMEOUT_S, chunk_bytes, in_flight)
        await reader.read(owner.handle, RANGES, into.data)
        truth = pattern(LENGTH)
        assert (into == np.concatenate([truth[each.offset_bytes :][: each.length_bytes] for each in RANGES])).all()
        bus = network.bus("another", None)
        nothing = ReadRegion(
            protocol=TRANSFER_PROTOCOL_VERSION, token=owner.handle.token, offset_bytes=LENGTH, length_bytes=0
        )
        _, frames = await bus.request_frames("owner", nothing, RegionChunk, TIMEOUT_S)
        assert [len(frame) for frame in frames] == [0]
        with pytest.raises(TransferError, match="out_of_range"):
            await reader.read(owner.handle, [ByteRange(LENGTH, 1)], memoryview(bytearray(1)))
        owner.exporter.close()
        with pytest.raises(TransferError, match="gone"):
            await reader.read(owner.handle, [ByteRange(0, 1)], memoryview(bytearray(1)))

    play(scenario)


def test_an_owner_answers_other_requests_while_its_device_is_read() -> None:
    async def scenario(network: MemoryNetwork) -> None:
        held = Held()
        owner, bus = Owner(network, held), network.bus("reader", None)
        quick = owner.exporter.register(pattern(MIB).data)
        slow = asyncio.create_task(
            TcpReader(bus, TIMEOUT_S).read(owner.handle, [ByteRange(0, 1)], memoryview(bytearray(1)))
        )
        await until(held.begun)
        into = bytearray(MIB)
        await TcpReader(bus, TIMEOUT_S).read(quick, [ByteRange(0, MIB)], memoryview(into))
        assert into == pattern(MIB).tobytes()
        assert not slow.done()
        held.may_end.set()
        await slow

    play(scenario)


def test_memory_that_is_withdrawn_during_a_read_is_not_sent() -> None:
    async def scenario(network: MemoryNetwork) -> None:
        held = Held()
        owner, bus = Owner(network, held), network.bus("reader", None)
        request = ReadRegion(
            protocol=TRANSFER_PROTOCOL_VERSION, token=owner.handle.token, offset_bytes=0, length_bytes=10
        )
        asked = asyncio.create_task(bus.request_frames("owner", request, RegionChunk, TIMEOUT_S))
        await until(held.begun)
        asyncio.get_running_loop().call_later(0.05, held.may_end.set)
        closing = asyncio.get_running_loop().run_in_executor(None, owner.exporter.close)
        with pytest.raises(PeerError) as refused:
            await asked
        assert refused.value.code == "gone"
        await closing

    play(scenario)


def test_the_task_that_answers_raises_device_lost_error() -> None:
    async def scenario(network: MemoryNetwork) -> None:
        held = Held(DeviceLostError("CUDA error: it fell off the bus"))
        held.may_end.set()
        owner, bus = Owner(network, held), network.bus("reader", None)
        with pytest.raises(TransferError, match="timeout"):
            await TcpReader(bus, 0.5).read(owner.handle, [ByteRange(0, 1)], memoryview(bytearray(1)))
        with pytest.raises(DeviceLostError):
            await owner.answering[0]

    play(scenario)
