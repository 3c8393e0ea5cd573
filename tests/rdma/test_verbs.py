"""RDMA reads between real processes: results, refusals, and the death of a process during a read."""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from loraserve.bus.zmq import open_bus
from loraserve.config import Config
from loraserve.messages.transfer import TRANSFER_PROTOCOL_VERSION, VerbsHandle
from loraserve.testing.memory_owner import pattern
from loraserve.testing.verbs_owner import FORK, VerbsOwner
from loraserve.transfer.protocol import ByteRange, TransferError
from loraserve.transfer.verbs.device import RdmaDevice
from loraserve.transfer.verbs.reader import VerbsReader

MIB = 1 << 20
LENGTH = 8 * MIB
TRUTH = pattern(LENGTH)
TIMEOUT_S = 5.0
HANGS_S = 60.0
ALL = [ByteRange(0, LENGTH)]
Say = Callable[[str], None]
Scenario = Callable[[VerbsReader], Awaitable[None]]


async def reading(config: Config, scenario: Scenario, name: str = "reader", **options: int) -> None:
    bus, device = open_bus(config, name, None), RdmaDevice()
    reader = VerbsReader(bus, device, TIMEOUT_S, **options)
    try:
        async with asyncio.timeout(HANGS_S):
            await scenario(reader)
    finally:
        reader.close()
        device.close()
        await bus.close()


def play(config: Config, scenario: Scenario, **options: int) -> None:
    asyncio.run(reading(config, scenario, **options))


async def refusal(reader: VerbsReader, handle: VerbsHandle, ranges: list[ByteRange]) -> TransferError:
    into = bytearray(sum(each.length_bytes for each in ranges))
    with pytest.raises(TransferError) as refused:
        await reader.read(handle, ranges, memoryview(into))
    assert not any(into)
    assert handle.owner in refused.value.message
    return refused.value


async def check(reader: VerbsReader, handle: VerbsHandle, ranges: list[ByteRange]) -> None:
    """Read into the middle of a larger buffer. The bytes around it must not change."""
    around = np.zeros(sum(each.length_bytes for each in ranges) + 2, np.uint8)
    await reader.read(handle, ranges, around.data[1:-1])
    expected = [TRUTH[each.offset_bytes :][: each.length_bytes] for each in ranges]
    assert (around[1:-1] == np.concatenate(expected)).all()
    assert around[0] == around[-1] == 0


async def begun(into: "np.ndarray[tuple[int], np.dtype[np.uint8]]") -> None:
    while not into[0]:  # noqa: ASYNC110
        await asyncio.sleep(0.001)


def test_everything_and_ranges_of_it_arrive(owner: VerbsOwner, config: Config) -> None:
    async def scenario(reader: VerbsReader) -> None:
        into = np.zeros(LENGTH, np.uint8)
        place = reader.keep(into.data)
        await reader.read(owner.handle, ALL, into.data)
        assert hashlib.sha256(into).digest() == hashlib.sha256(TRUTH).digest()
        into[:] = 0
        await reader.read_into(owner.handle, [ByteRange(7, 5)], place, 11)
        assert (into[11:16] == TRUTH[7:12]).all()
        assert not into[:11].any()
        assert not into[16:].any()
        await check(
            reader,
            owner.handle,
            [ByteRange(5, 10), ByteRange(LENGTH - 3 * MIB, 3 * MIB), ByteRange(0, 0), ByteRange(7, 1)],
        )
        await reader.read(owner.handle, [], memoryview(bytearray()))
        assert reader.connected == owner.serving() == 1

    play(config, scenario, piece_bytes=1_000_000)


def test_messages_are_no_longer_than_the_device_sends(owner: VerbsOwner, config: Config) -> None:
    play(config, lambda reader: check(reader, owner.handle, ALL), piece_bytes=1 << 30)


def test_a_thousand_small_reads_at_once(owner: VerbsOwner, config: Config, say: Say) -> None:
    async def scenario(reader: VerbsReader) -> None:
        into = np.zeros((1000, 4096), np.uint8)
        reader.keep(into.reshape(-1).data)
        started_s = time.monotonic()
        starts = range(0, 1000 * 8192, 8192)
        reads = [
            reader.read(owner.handle, [ByteRange(at, 4096)], row.data) for at, row in zip(starts, into, strict=True)
        ]
        await asyncio.gather(*reads)
        say(f"1,000 reads of 4 KiB at once: {time.monotonic() - started_s:.2f} s")
        assert all((row == TRUTH[at : at + 4096]).all() for at, row in zip(starts, into, strict=True))
        assert reader.connected == owner.serving() == 1

    play(config, scenario)


def test_a_wrong_key_is_refused_and_harms_no_other_read(owner: VerbsOwner, config: Config) -> None:
    async def scenario(reader: VerbsReader) -> None:
        wrong = msgspec.structs.replace(owner.handle, key=owner.handle.key ^ 0xFF00)
        good = asyncio.create_task(check(reader, owner.handle, ALL))
        error = await refusal(reader, wrong, [ByteRange(0, 4096)])
        assert error.code == "gone"
        assert "key" in error.message
        await good
        await check(reader, owner.handle, [ByteRange(3, 4)])

    play(config, scenario)


def test_bytes_outside_the_region_are_not_read(owner: VerbsOwner, config: Config) -> None:
    async def scenario(reader: VerbsReader) -> None:
        assert (await refusal(reader, owner.handle, [ByteRange(0, 2), ByteRange(LENGTH - 1, 2)])).code == "out_of_range"
        newer = msgspec.structs.replace(owner.handle, protocol=TRANSFER_PROTOCOL_VERSION + 1)
        assert (await refusal(reader, newer, [ByteRange(0, 1)])).code == "version"
        assert reader.connected == 0, "neither was asked for"
        # The device itself refuses what a handle that lies would let through.
        longer = msgspec.structs.replace(owner.handle, length_bytes=2 * LENGTH)
        assert (await refusal(reader, longer, [ByteRange(LENGTH - 1, 2)])).code == "gone"
        before = msgspec.structs.replace(owner.handle, base=owner.handle.base - 1)
        assert (await refusal(reader, before, [ByteRange(0, 1)])).code == "gone"
        await check(reader, owner.handle, [ByteRange(0, 1)])

    play(config, scenario)


def test_an_owner_that_is_killed_while_it_is_read_is_gone(mortal: VerbsOwner, config: Config, say: Say) -> None:
    async def scenario(reader: VerbsReader) -> None:
        into = np.zeros(LENGTH, np.uint8)
        reader.keep(into.data)

        async def endless() -> None:
            while True:
                await reader.read(mortal.handle, ALL, into.data)

        reads = [asyncio.create_task(endless()) for _ in range(4)]
        await begun(into)
        mortal.kill()
        killed_s = time.monotonic()
        failed = await asyncio.gather(*reads, return_exceptions=True)
        codes = [each.code for each in failed if isinstance(each, TransferError)]
        say(f"owner killed while it was read: {codes} after {time.monotonic() - killed_s:.2f} s")
        assert len(codes) == len(reads)
        assert "gone" in codes
        # There is nobody to connect to for those whose next read began just then, nor for any later one.
        assert set(codes) <= {"gone", "timeout"}
        assert (await refusal(reader, mortal.handle, [ByteRange(0, 1)])).code == "timeout"
        with VerbsOwner(TRUTH, config, "mortal") as again:
            assert (await refusal(reader, mortal.handle, [ByteRange(0, 1)])).code == "gone"
            await check(reader, again.handle, [ByteRange(0, MIB)])

    play(config, scenario)


def test_a_reader_that_is_killed_leaves_the_owner_as_it_was(owner: VerbsOwner, config: Config) -> None:
    async def endless(reader: VerbsReader) -> None:
        while True:
            await check(reader, owner.handle, ALL)

    other = FORK.Process(target=lambda: asyncio.run(reading(config, endless, "other")), daemon=True)
    other.start()
    while not owner.serving():
        time.sleep(0.05)
    time.sleep(0.5)
    other.kill()
    other.join()

    async def scenario(reader: VerbsReader) -> None:
        await check(reader, owner.handle, ALL)
        assert owner.serving() == 2, "nobody told it yet"
        owner.forget("other")
        assert owner.serving() == 1
        await check(reader, owner.handle, [ByteRange(0, 1)])

    play(config, scenario)


def test_a_forgotten_peer_reads_nothing_until_it_reconnects(owner: VerbsOwner, config: Config) -> None:
    async def scenario(reader: VerbsReader) -> None:
        await check(reader, owner.handle, [ByteRange(0, 1)])
        owner.forget("reader")
        assert (await refusal(reader, owner.handle, [ByteRange(0, 1)])).code == "gone"
        await check(reader, owner.handle, [ByteRange(0, 1)])
        assert owner.serving() == 1

    play(config, scenario)


def test_withdrawn_memory_is_gone_for_connected_readers_too(mortal: VerbsOwner, config: Config) -> None:
    async def scenario(reader: VerbsReader) -> None:
        await check(reader, mortal.handle, [ByteRange(0, 1)])
        mortal.withdraw()
        for _ in range(2):
            assert (await refusal(reader, mortal.handle, [ByteRange(0, 1)])).code == "gone"

    play(config, scenario)


def test_nothing_is_written_after_a_read_was_cancelled(owner: VerbsOwner, config: Config) -> None:
    async def scenario(reader: VerbsReader) -> None:
        into = np.zeros(LENGTH, np.uint8)
        reader.keep(into.data)
        read = asyncio.create_task(reader.read(owner.handle, ALL, into.data))
        await begun(into)
        for _ in range(2):
            read.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await read
        assert not into[-1], "it ended where it was and not with the last piece"
        into[:] = 0
        await asyncio.sleep(0.5)
        assert not into.any()
        await reader.read(owner.handle, ALL, into.data)
        assert (into == TRUTH).all()

    play(config, scenario, piece_bytes=100_000, depth=4)


def test_a_connection_that_is_idle_takes_no_processor_time(owner: VerbsOwner, config: Config) -> None:
    async def scenario(reader: VerbsReader) -> None:
        await check(reader, owner.handle, [ByteRange(0, 1)])
        before_s = time.process_time()
        await asyncio.sleep(2.0)
        assert time.process_time() - before_s < 1.0

    play(config, scenario)


def test_descriptors_are_let_go(owner: VerbsOwner, config: Config) -> None:
    def opened() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = opened()
    play(config, lambda reader: check(reader, owner.handle, [ByteRange(0, 1)]))
    assert opened() == before
