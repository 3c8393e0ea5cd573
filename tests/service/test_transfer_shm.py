"""Reads of shared memory between real processes: contents, refusals, and owners killed with SIGKILL."""

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
"""With pieces of this size a read takes half a million copies and almost a second, so that a test can interrupt it."""
HOW = [{"sliced_bytes": 0, "piece_bytes": TINY_PIECES}, {"direct_bytes": TINY_PIECES}]
"""Options with which the reader copies in another thread, or slice by slice in the event loop's thread."""
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
    """Check that a read fails without writing, and return its error."""
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
def test_ranges_are_read_one_after_another(owner: MemoryOwner, options: dict[str, int]) -> None:
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


def test_a_read_returns_the_owners_latest_bytes() -> None:
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


def test_the_memory_of_a_killed_owner_is_unmapped_and_reads_fail(owner: MemoryOwner) -> None:
    async def scenario(reader: ShmReader) -> None:
        await reader.read(owner.shm, [ByteRange(0, 1)], memoryview(bytearray(1)))
        assert owner.shm.name in maps()
        owner.kill()
        await until(lambda: reader.mapped == 0)
        assert owner.shm.name not in maps(), "the memory was not released before the next read"
        assert not [name for name in os.listdir("/dev/shm") if NAME_PREFIX in name]
        for reads in (reader, ShmReader()):
            error = await refusal(reads, owner.shm, [ByteRange(0, 2 * MIB)], 2 * MIB)
            assert error.code == "gone"
            assert "another source" in error.message

    play(scenario)


async def begun(reader: ShmReader, owner: MemoryOwner) -> "tuple[npt.NDArray[np.uint8], asyncio.Task[None]]":
    """Start a read of the whole memory and return its target and its task once the first bytes have arrived."""
    into = np.zeros(LENGTH, np.uint8)
    read = asyncio.create_task(reader.read(owner.shm, [ByteRange(0, LENGTH)], into.data))
    await until(lambda: into[0] != UNTOUCHED)
    return into, read


@pytest.mark.parametrize("options", HOW)
def test_a_read_fails_if_its_owner_is_killed_meanwhile(owner: MemoryOwner, options: dict[str, int]) -> None:
    async def scenario(reader: ShmReader) -> None:
        into, read = await begun(reader, owner)
        owner.kill()
        assert into[-1] == UNTOUCHED, "the read ended before the owner was killed"
        with pytest.raises(TransferError) as failed:
            await read
        assert failed.value.code == "gone"
        await until(lambda: owner.shm.name not in maps())

    play(scenario, **options)


@pytest.mark.parametrize("options", HOW)
def test_a_cancelled_read_writes_no_more(owner: MemoryOwner, options: dict[str, int]) -> None:
    async def scenario(reader: ShmReader) -> None:
        into, read = await begun(reader, owner)
        read.cancel()
        with pytest.raises(asyncio.CancelledError):
            await read
        assert into[-1] == UNTOUCHED, "the read was completed instead of cancelled"
        into[:] = UNTOUCHED
        await asyncio.sleep(0.1)
        assert not into.any()

    play(scenario, **options)


def test_withdrawn_memory_is_gone_for_readers_that_have_mapped_it(owner: MemoryOwner) -> None:
    async def scenario(reader: ShmReader) -> None:
        await reader.read(owner.shm, [ByteRange(0, 1)], memoryview(bytearray(1)))
        owner.withdraw()
        assert (await refusal(reader, owner.shm, [ByteRange(0, 1)], 1)).code == "gone"
        assert owner.shm.name not in maps()

    play(scenario)


def test_handles_with_a_wrong_field_are_refused(owner: MemoryOwner) -> None:
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


def test_memory_that_its_owner_could_truncate_is_not_mapped() -> None:
    """A copy from truncated memory would kill the reader with SIGBUS."""
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


def test_memory_cannot_be_resized_and_only_its_user_may_open_it() -> None:
    memory = SharedMemory(MIB)
    descriptor = memory.export()
    for length in (0, 2 * MIB):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, length)
    assert os.fstat(descriptor).st_mode & 0o777 == 0o600
    os.close(descriptor)
    memory.close()
    memory.close()
    assert memory.view[0] == 0, "the owner can no longer use its memory"
    name = memory.name
    assert name in maps()
    del memory
    assert name not in maps()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_is_refused_and_told_that_a_dead_owner_is_gone(owner: MemoryOwner) -> None:
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
def test_memory_that_cannot_be_allocated_is_a_configuration_error(length_bytes: int) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match=f"{length_bytes} bytes of shared memory.*pool_bytes"):
        SharedMemory(length_bytes)
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_mappings_are_bounded_and_descriptors_are_closed() -> None:
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
