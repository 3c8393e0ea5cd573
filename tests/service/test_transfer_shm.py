"""Shared memory between real processes: what is read, what is refused, and what a kill -9 leaves behind."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from loraserve.errors import ConfigError
from loraserve.messages.transfer import TRANSFER_PROTOCOL_VERSION, ShmHandle
from loraserve.testing.memory_owner import MemoryOwner, pattern
from loraserve.transfer.protocol import ByteRange, TransferError
from loraserve.transfer.same_host import NAME_PREFIX, check_offered
from loraserve.transfer.shm import SharedMemory, ShmExporter, ShmReader

MIB = 1 << 20
LENGTH = 16 * MIB
UNTOUCHED = 0
TINY_PIECES = 32
"""Half a million copies: the better part of a second, in which a test kills or cancels."""
HOW = [{"sliced_bytes": 0, "piece_bytes": TINY_PIECES}, {"direct_bytes": TINY_PIECES}]
"""In another thread, or by slices in the event loop's."""
NOBODY = 65_534


@pytest.fixture
def owner() -> Iterator[MemoryOwner]:
    with MemoryOwner(LENGTH) as owner:
        yield owner


def play(scenario: Callable[[ShmReader], Awaitable[None]], **options: int) -> None:
    async def main() -> None:
        reader = ShmReader(**options)
        try:
            await scenario(reader)
        finally:
            reader.close()

    asyncio.run(main())


async def refusal(reader: ShmReader, handle: ShmHandle, ranges: list[ByteRange], into_bytes: int) -> TransferError:
    """The error of a read that must fail and must not write."""
    into = bytearray(into_bytes)
    with pytest.raises(TransferError) as refused:
        await reader.read(handle, ranges, memoryview(into))
    assert not any(into)
    assert handle.owner in refused.value.message
    return refused.value


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def maps() -> str:
    return Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("options", [{}, {"direct_bytes": 100_000}, {"sliced_bytes": 0, "piece_bytes": 100_000}])
def test_ranges_arrive_one_after_another(owner: MemoryOwner, options: dict[str, int]) -> None:
    ranges = [ByteRange(5, 10), ByteRange(LENGTH - 3 * MIB, 3 * MIB), ByteRange(0, 0), ByteRange(7, 1)]
    truth = pattern(LENGTH)

    async def scenario(reader: ShmReader) -> None:
        for _ in range(2):
            into = np.zeros(3 * MIB + 11, np.uint8)
            await reader.read(owner.shm, ranges, into.data)
            assert (into == np.concatenate([truth[each.offset_bytes :][: each.length_bytes] for each in ranges])).all()
        await reader.read(owner.shm, [], memoryview(bytearray()))
        assert reader.mapped == 1

    play(scenario, **options)


def test_what_the_owner_writes_later_is_read_without_its_doing() -> None:
    async def scenario(reader: ShmReader) -> None:
        memory, exporter = SharedMemory(MIB), ShmExporter("me", "i")
        handle = exporter.register(memory)
        for value in (1, 2):
            memory.view[10] = value
            into = bytearray(1)
            await reader.read(handle, [ByteRange(10, 1)], memoryview(into))
            assert into[0] == value
        exporter.close()
        memory.close()

    play(scenario)


def test_a_killed_owner_is_gone_and_leaves_nothing_behind(owner: MemoryOwner) -> None:
    async def scenario(reader: ShmReader) -> None:
        await reader.read(owner.shm, [ByteRange(0, 1)], memoryview(bytearray(1)))
        assert owner.shm.name in maps()
        owner.kill()
        await until(lambda: reader.mapped == 0)
        assert owner.shm.name not in maps(), "its memory is the machine's again before anybody reads"
        assert not [name for name in os.listdir("/dev/shm") if NAME_PREFIX in name]
        for reads in (reader, ShmReader()):
            error = await refusal(reads, owner.shm, [ByteRange(0, 2 * MIB)], 2 * MIB)
            assert error.code == "gone"
            assert "another source" in error.message

    play(scenario)


async def begun(reader: ShmReader, owner: MemoryOwner) -> "tuple[npt.NDArray[np.uint8], asyncio.Task[None]]":
    """A read of everything that has written its first bytes."""
    into = np.zeros(LENGTH, np.uint8)
    read = asyncio.create_task(reader.read(owner.shm, [ByteRange(0, LENGTH)], into.data))
    await until(lambda: into[0] != UNTOUCHED)
    return into, read


@pytest.mark.parametrize("options", HOW)
def test_an_owner_that_is_killed_while_it_is_read_is_gone(owner: MemoryOwner, options: dict[str, int]) -> None:
    async def scenario(reader: ShmReader) -> None:
        into, read = await begun(reader, owner)
        owner.kill()
        assert into[-1] == UNTOUCHED, "the read was over before the owner was"
        with pytest.raises(TransferError) as failed:
            await read
        assert failed.value.code == "gone"
        await until(lambda: owner.shm.name not in maps())

    play(scenario, **options)


@pytest.mark.parametrize("options", HOW)
def test_nobody_writes_once_a_read_was_cancelled(owner: MemoryOwner, options: dict[str, int]) -> None:
    async def scenario(reader: ShmReader) -> None:
        into, read = await begun(reader, owner)
        read.cancel()
        with pytest.raises(asyncio.CancelledError):
            await read
        assert into[-1] == UNTOUCHED, "it ended where it was and not with the last piece"
        into[:] = UNTOUCHED
        await asyncio.sleep(0.1)
        assert not into.any()

    play(scenario, **options)


def test_withdrawn_memory_is_gone_also_for_those_who_mapped_it(owner: MemoryOwner) -> None:
    async def scenario(reader: ShmReader) -> None:
        await reader.read(owner.shm, [ByteRange(0, 1)], memoryview(bytearray(1)))
        owner.withdraw()
        assert (await refusal(reader, owner.shm, [ByteRange(0, 1)], 1)).code == "gone"
        assert owner.shm.name not in maps()

    play(scenario)


def test_handles_that_name_something_else(owner: MemoryOwner) -> None:
    good = owner.shm
    cases = [
        ({"name": NAME_PREFIX + "0" * 32}, "gone"),
        ({"descriptor": 0}, "gone"),
        ({"descriptor": -1}, "gone"),
        ({"descriptor": 10**15}, "gone"),
        ({"pid": os.getpid()}, "gone"),
        ({"pid": 2**62}, "gone"),
        ({"length_bytes": LENGTH + 1}, "refused"),
        ({"length_bytes": 2**63}, "refused"),
        ({"protocol": TRANSFER_PROTOCOL_VERSION + 1}, "version"),
    ]

    async def scenario(reader: ShmReader) -> None:
        for changes, code in cases:
            handle = msgspec.structs.replace(good, **changes)
            assert (await refusal(reader, handle, [ByteRange(0, 1)], 1)).code == code, changes
        assert (await refusal(reader, good, [ByteRange(0, 2), ByteRange(LENGTH - 1, 2)], 4)).code == "out_of_range"
        assert (await refusal(reader, good, [ByteRange(0, 2)], 3)).code == "size"
        assert reader.mapped == 0

    play(scenario)


def test_memory_that_its_owner_could_cut_short_is_not_mapped() -> None:
    """A copy from pages that are no more would kill the reader with SIGBUS."""
    descriptor = os.memfd_create(NAME_PREFIX + "open", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, MIB)
    handle = ShmHandle(
        protocol=TRANSFER_PROTOCOL_VERSION,
        owner="me",
        incarnation="i",
        length_bytes=MIB,
        pid=os.getpid(),
        descriptor=descriptor,
        name=NAME_PREFIX + "open",
    )

    async def scenario(reader: ShmReader) -> None:
        error = await refusal(reader, handle, [ByteRange(0, 1)], 1)
        assert error.code == "refused"
        assert "sealed" in error.message

    play(scenario)
    os.close(descriptor)


def test_a_memory_keeps_its_length_and_is_its_user_s_alone() -> None:
    memory = SharedMemory(MIB)
    descriptor = memory.export()
    for length in (0, 2 * MIB):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, length)
    assert os.fstat(descriptor).st_mode & 0o777 == 0o600
    os.close(descriptor)
    memory.close()
    memory.close()
    assert memory.view[0] == 0, "the owner's own use of it goes on"
    name = memory.name
    assert name in maps()
    del memory
    assert name not in maps()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_another_user_is_refused_and_sees_the_dead_as_gone(owner: MemoryOwner) -> None:
    def seen_by_nobody() -> str:
        reading, writing = os.pipe()
        if os.fork() == 0:
            try:
                os.setuid(NOBODY)
                check_offered(owner.shm)
            except TransferError as error:
                os.write(writing, error.code.encode())
            finally:
                os._exit(0)
        os.close(writing)
        os.wait()
        with open(reading) as pipe:
            return pipe.read()

    assert seen_by_nobody() == "refused"
    owner.kill()
    assert seen_by_nobody() == "gone"


@pytest.mark.parametrize("length_bytes", [0, -1, 1 << 62, 1 << 80])
def test_memory_that_cannot_be_had_is_a_clear_error(length_bytes: int) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match=f"{length_bytes} bytes of shared memory.*pool_bytes"):
        SharedMemory(length_bytes)
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_mappings_and_descriptors_are_bounded_and_let_go() -> None:
    before = len(os.listdir("/proc/self/fd"))
    exporter = ShmExporter("me", "i")

    async def scenario(reader: ShmReader) -> None:
        handles = []
        for value in range(1, 6):
            memory = SharedMemory(MIB)
            memory.view[0] = value
            handles.append(exporter.register(memory))
            memory.close()
        for _ in range(2):
            for value, handle in enumerate(handles, 1):
                into = bytearray(1)
                await reader.read(handle, [ByteRange(0, 1)], memoryview(into))
                assert into[0] == value
                assert reader.mapped <= 2
        del memory
        assert sum(handle.name in maps() for handle in handles) == 2

    play(scenario, mappings=2)
    exporter.close()
    assert len(os.listdir("/proc/self/fd")) == before
