"""Reads over the bus, in memory and over real sockets, from owners that work, restart, refuse or send wrong answers."""

import asyncio
import tempfile
import weakref
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from loraserve.bus.zmq import open_bus
from loraserve.config import ClusterConfig, Config
from loraserve.errors import PeerError
from loraserve.messages import ReadRegion, RegionChunk
from loraserve.messages.transfer import TRANSFER_PROTOCOL_VERSION, TcpHandle
from loraserve.testing.memory_bus import Fault, MemoryNetwork
from loraserve.testing.memory_owner import MemoryOwner, pattern
from loraserve.testing.peers import Peer
from loraserve.transfer.protocol import ByteRange, TransferError
from loraserve.transfer.tcp import LONGEST_CHUNK_BYTES, TcpExporter, TcpReader

MIB = 1 << 20
LENGTH = 16 * MIB
LONG = LONGEST_CHUNK_BYTES + 2 * MIB
TIMEOUT_S = 20.0
SHORT_S = 0.5
RANGES = [ByteRange(5, 10), ByteRange(LENGTH - 3 * MIB, 3 * MIB), ByteRange(0, 0), ByteRange(7, 1)]


class Owner:
    """A process on the in-memory network that offers the pattern. It first refuses ``refusals`` requests."""

    def __init__(self, network: MemoryNetwork, length: int = LENGTH) -> None:
        self.bus = network.bus("owner", ReadRegion)
        self.exporter = TcpExporter(self.bus)
        self.handle = self.exporter.register(pattern(length).data)
        self.answered = 0
        self.refusals = 0
        self._serving = asyncio.create_task(self._serve())

    async def _serve(self) -> None:
        while True:
            envelope = await self.bus.receive()
            if self.refusals:
                self.refusals -= 1
                self.bus.refuse(envelope, "starting", "owner is starting; ask again")
            else:
                self.exporter.answer(envelope)
                self.answered += 1


@pytest.fixture
def config() -> Iterator[Config]:
    with tempfile.TemporaryDirectory(prefix="ls-") as folder:
        yield Config(cluster=ClusterConfig(run_dir=f"{folder}/run"))


def play(scenario: Callable[[MemoryNetwork], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(2 * TIMEOUT_S):
            await scenario(MemoryNetwork())

    asyncio.run(main())


async def check(reader: TcpReader, handle: TcpHandle, ranges: list[ByteRange]) -> None:
    """Check that a read into the middle of a buffer writes the ranges and nothing around them."""
    length = sum(each.length_bytes for each in ranges)
    around = np.zeros(length + 2, np.uint8)
    await reader.read(handle, ranges, around.data[1:-1])
    truth = pattern(LENGTH)
    expected = [truth[each.offset_bytes :][: each.length_bytes] for each in ranges]
    assert (around[1:-1] == np.concatenate(expected)).all()
    assert around[0] == around[-1] == 0


async def refusal(reader: TcpReader, handle: TcpHandle, ranges: list[ByteRange], into_bytes: int) -> TransferError:
    into = bytearray(into_bytes)
    with pytest.raises(TransferError) as refused:
        await reader.read(handle, ranges, memoryview(into))
    assert not any(into)
    assert "owner" in refused.value.message
    return refused.value


@pytest.mark.parametrize(("chunk_bytes", "in_flight"), [(MIB, 4), (100_000, 1), (LONGEST_CHUNK_BYTES, 2)])
def test_ranges_are_read_over_the_in_memory_network(chunk_bytes: int, in_flight: int) -> None:
    async def scenario(network: MemoryNetwork) -> None:
        owner, bus = Owner(network), network.bus("reader", None)
        await check(TcpReader(bus, TIMEOUT_S, chunk_bytes, in_flight), owner.handle, RANGES)

    play(scenario)


def test_ranges_are_read_from_another_process_over_sockets(config: Config) -> None:
    async def main() -> None:
        with MemoryOwner(LENGTH, config) as owner:
            bus = open_bus(config, "reader", None)
            reader = TcpReader(bus, TIMEOUT_S)
            await check(reader, owner.tcp, RANGES)
            assert (await refusal(reader, owner.shm, [ByteRange(0, 1)], 1)).code == "refused"  # type: ignore[arg-type]
            owner.withdraw()
            assert (await refusal(reader, owner.tcp, [ByteRange(0, 1)], 1)).code == "gone"
            await bus.close()

    asyncio.run(main())


def test_a_read_fails_if_its_owner_is_killed_and_restarted_meanwhile(config: Config) -> None:
    async def main() -> None:
        bus = open_bus(config, "reader", None)
        first = MemoryOwner(LENGTH, config)
        into = np.zeros(LENGTH, np.uint8)
        # Enough chunks that the owner dies in the middle of the read.
        read = asyncio.create_task(
            TcpReader(bus, TIMEOUT_S, 1000, 2).read(first.tcp, [ByteRange(0, LENGTH)], into.data)
        )
        while not into[0]:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        first.kill()
        with MemoryOwner(LENGTH, config) as second:
            with pytest.raises(TransferError) as failed:
                await read
            assert failed.value.code == "gone"
            assert not into[-1]
            await check(TcpReader(bus, TIMEOUT_S), second.tcp, RANGES)
        await bus.close()

    asyncio.run(main())


def test_a_read_from_an_owner_that_does_not_return_times_out() -> None:
    async def scenario(network: MemoryNetwork) -> None:
        owner, bus = Owner(network), network.bus("reader", None)
        network.kill("owner")
        error = await refusal(TcpReader(bus, SHORT_S), owner.handle, [ByteRange(0, 1)], 1)
        assert error.code == "timeout"
        assert "another source" in error.message

    play(scenario)


def test_only_chunks_lost_with_a_connection_are_requested_again() -> None:
    """The connection is lost and the owner's process lives on."""

    async def scenario(network: MemoryNetwork) -> None:
        owner, bus = Owner(network), network.bus("reader", None)
        lost = Fault(copies=0)
        network.faults = lambda sender, *_: lost if sender == "owner" and owner.answered == 2 else None

        async def lose() -> None:
            while owner.answered < 3:  # noqa: ASYNC110
                await asyncio.sleep(0)
            bus.lost("owner")

        losing = asyncio.create_task(lose())
        await check(TcpReader(bus, TIMEOUT_S, MIB, 1), owner.handle, [ByteRange(0, 5 * MIB)])
        await losing
        assert owner.answered == 5 + 1

    play(scenario)


def test_requests_to_a_starting_owner_are_repeated() -> None:
    async def scenario(network: MemoryNetwork) -> None:
        owner, bus = Owner(network), network.bus("reader", None)
        owner.refusals = 2
        await check(TcpReader(bus, TIMEOUT_S, MIB, 1), owner.handle, RANGES)
        assert owner.refusals == 0

    play(scenario)


@pytest.mark.parametrize("answer", [RegionChunk(token="t", offset_bytes=0), RegionChunk(token="t", offset_bytes=1)])
def test_an_answer_without_its_bytes_is_not_written(answer: RegionChunk) -> None:
    async def scenario(network: MemoryNetwork) -> None:
        Peer(network, "owner", ReadRegion, lambda _: answer)
        handle = TcpHandle(
            protocol=TRANSFER_PROTOCOL_VERSION, owner="owner", incarnation="i", length_bytes=2, token="t"
        )
        assert (
            await refusal(TcpReader(network.bus("reader", None), SHORT_S), handle, [ByteRange(0, 2)], 2)
        ).code == "size"

    play(scenario)


@pytest.mark.parametrize(
    ("changes", "start", "code"),
    [
        ({"token": "0" * 32}, 0, "gone"),
        ({"protocol": TRANSFER_PROTOCOL_VERSION + 1}, 0, "version"),
        ({"length_bytes": LENGTH + 1}, LENGTH, "out_of_range"),
    ],
)
def test_handles_with_a_wrong_field_are_refused(changes: dict[str, Any], start: int, code: str) -> None:
    async def scenario(network: MemoryNetwork) -> None:
        owner = Owner(network)
        handle = msgspec.structs.replace(owner.handle, **changes)
        reader = TcpReader(network.bus("reader", None), TIMEOUT_S)
        assert (await refusal(reader, handle, [ByteRange(start, 1)], 1)).code == code

    play(scenario)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"protocol": TRANSFER_PROTOCOL_VERSION + 1}, "version"),
        ({"token": ""}, "gone"),
        ({"offset_bytes": -1}, "out_of_range"),
        ({"offset_bytes": LONG - 9}, "out_of_range"),
        ({"length_bytes": -1}, "out_of_range"),
        ({"length_bytes": 2**63, "offset_bytes": 2**63}, "out_of_range"),
        ({"length_bytes": LONGEST_CHUNK_BYTES + 1}, "size"),
    ],
)
def test_an_owner_refuses_invalid_requests(changes: dict[str, Any], code: str) -> None:
    async def scenario(network: MemoryNetwork) -> None:
        owner, bus = Owner(network, LONG), network.bus("reader", None)
        good = ReadRegion(protocol=TRANSFER_PROTOCOL_VERSION, token=owner.handle.token, offset_bytes=0, length_bytes=10)
        _, frames = await bus.request_frames("owner", good, RegionChunk, TIMEOUT_S)
        assert [len(frame) for frame in frames] == [10]
        asked = msgspec.structs.replace(good, **changes)
        with pytest.raises(PeerError) as refused:
            await bus.request_frames("owner", asked, RegionChunk, TIMEOUT_S)
        assert refused.value.code == code

    play(scenario)


def test_the_number_of_chunks_in_flight_is_limited() -> None:
    async def scenario(network: MemoryNetwork) -> None:
        owner, bus = Owner(network), network.bus("reader", None)
        under_way, most = 0, 0

        def watch(sender: str, _: str, message: Any) -> Fault:
            nonlocal under_way, most
            under_way += 1 if isinstance(message, ReadRegion) else -1
            most = max(most, under_way)
            return Fault(delay_s=0.001)

        network.faults = watch
        await check(TcpReader(bus, TIMEOUT_S, 100_000, 3), owner.handle, [ByteRange(0, 4 * MIB)])
        assert (most, under_way) == (3, 0)

    play(scenario)


def test_a_cancelled_read_writes_no_more() -> None:
    async def scenario(network: MemoryNetwork) -> None:
        owner, bus = Owner(network), network.bus("reader", None)
        network.faults = lambda *_: Fault(delay_s=0.01)
        into = np.zeros(LENGTH, np.uint8)
        read = asyncio.create_task(
            TcpReader(bus, TIMEOUT_S, MIB, 4).read(owner.handle, [ByteRange(0, LENGTH)], into.data)
        )
        while not into[0]:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        read.cancel()
        with pytest.raises(asyncio.CancelledError):
            await read
        assert not into[-1]
        into[:] = 0
        await asyncio.sleep(0.1)
        assert not into.any()

    play(scenario)


class Answers:
    """The part of a bus that a reader needs. Each answer has its own memory.

    ``most`` is the largest number of earlier answers that the reader still held at a request.
    """

    def __init__(self) -> None:
        self._given: list[weakref.ref[Any]] = []
        self.most = 0

    async def request_frames(self, _peer: str, asked: ReadRegion, *_: Any) -> tuple[RegionChunk, tuple[memoryview]]:
        self.most = max(self.most, sum(each() is not None for each in self._given))
        data = np.ones(asked.length_bytes, np.uint8)
        self._given.append(weakref.ref(data))
        return RegionChunk(token=asked.token, offset_bytes=asked.offset_bytes), (data.data,)


def test_a_chunk_is_released_before_the_next_is_requested() -> None:
    answers, into = Answers(), np.zeros(10, np.uint8)
    handle = TcpHandle(protocol=TRANSFER_PROTOCOL_VERSION, owner="owner", incarnation="i", length_bytes=10, token="t")
    reader = TcpReader(answers, TIMEOUT_S, 3, 1)  # type: ignore[arg-type]
    asyncio.run(reader.read(handle, [ByteRange(0, 10)], into.data))
    assert into.all()
    assert answers.most == 0
