"""Reads of GPU memory between real processes, with the fake driver and with the real one if there is a GPU."""

import asyncio
import hashlib
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import msgspec
import numpy as np
import pytest

from loraserve.errors import ConfigError
from loraserve.messages.transfer import TRANSFER_PROTOCOL_VERSION, CudaIpcHandle, TcpHandle
from loraserve.testing.gpu_owner import OFFSET, GpuOwner, from_gpu, to_gpu
from loraserve.testing.memory_owner import pattern
from loraserve.transfer.abilities import local_abilities
from loraserve.transfer.cuda_driver import GpuMemory, allocate, free
from loraserve.transfer.cuda_ipc import CudaIpcExporter, CudaIpcReader, unusable_reason
from loraserve.transfer.protocol import ByteRange, TransferError
from loraserve.transfer.same_host import NAME_PREFIX

MIB = 1 << 20
LENGTH = 16 * MIB
RANGES = [ByteRange(5, 10), ByteRange(LENGTH - 3 * MIB, 3 * MIB), ByteRange(0, 0), ByteRange(7, 1)]
WANTED = sum(each.length_bytes for each in RANGES)
GUARD = 64


def expected() -> bytes:
    truth = pattern(LENGTH)
    return np.concatenate([truth[each.offset_bytes :][: each.length_bytes] for each in RANGES]).tobytes()


@pytest.fixture
def owner(driver: str) -> Iterator[GpuOwner]:
    with GpuOwner(LENGTH) as owner:
        yield owner


@contextmanager
def room(length_bytes: int, device: int = 0) -> Iterator[GpuMemory]:
    """Allocate zeroed GPU memory for the block."""
    memory = allocate(length_bytes, device)
    to_gpu(memory, np.zeros(length_bytes, np.uint8))
    try:
        yield memory
    finally:
        free(memory)


def play(scenario: Callable[[CudaIpcReader], Awaitable[None]], device: int = 0, **options: int) -> None:
    async def main() -> None:
        reader = CudaIpcReader(device, **options)
        try:
            await scenario(reader)
        finally:
            reader.close()

    asyncio.run(main())


async def refusal(
    reader: CudaIpcReader, handle: CudaIpcHandle, ranges: list[ByteRange], device: int = 0
) -> TransferError:
    """Check that reads to GPU and host fail without writing, and return the error."""
    length = max(1, sum(each.length_bytes for each in ranges))
    into = bytearray(sum(each.length_bytes for each in ranges))
    with room(length, device) as memory:
        with pytest.raises(TransferError) as refused:
            await reader.read_into(handle, ranges, memory, 0)
        assert not from_gpu(memory).any()
    with pytest.raises(TransferError) as here:
        await reader.read(handle, ranges, memoryview(into))
    assert not any(into)
    assert here.value.code == refused.value.code
    assert handle.owner in refused.value.message
    return refused.value


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def test_ranges_are_read_into_gpu_memory_and_nothing_is_written_beside_them(owner: GpuOwner) -> None:
    async def scenario(reader: CudaIpcReader) -> None:
        with room(WANTED + 2 * GUARD) as memory:
            for _ in range(2):
                await reader.read_into(owner.handle, RANGES, memory, GUARD)
                found = from_gpu(memory)
                assert hashlib.sha256(found[GUARD:-GUARD]).digest() == hashlib.sha256(expected()).digest()
                assert not found[:GUARD].any()
                assert not found[-GUARD:].any()
            assert reader.mapped == 1
            await reader.read_into(owner.handle, [], memory, memory.length_bytes)

    play(scenario)


def test_ranges_are_read_into_host_memory(owner: GpuOwner) -> None:
    async def scenario(reader: CudaIpcReader) -> None:
        into = bytearray(WANTED)
        await reader.read(owner.handle, RANGES, memoryview(into))
        assert into == expected()
        await reader.read(owner.handle, [], memoryview(bytearray()))

    play(scenario)


def test_concurrent_reads_each_get_their_own_ranges(owner: GpuOwner) -> None:
    truth = pattern(LENGTH)

    async def scenario(reader: CudaIpcReader) -> None:
        with room(100 * 1000) as memory:
            reads = (reader.read_into(owner.handle, [ByteRange(i * 7919, 1000)], memory, i * 1000) for i in range(100))
            await asyncio.gather(*reads)
            found = from_gpu(memory).reshape(100, 1000)
            for i, row in enumerate(found):
                assert (row == truth[i * 7919 : i * 7919 + 1000]).all(), i

    play(scenario)


def test_the_memory_of_a_killed_owner_is_unmapped_at_once_and_reads_fail(owner: GpuOwner) -> None:
    async def scenario(reader: CudaIpcReader) -> None:
        await reader.read(owner.handle, [ByteRange(0, 1)], memoryview(bytearray(1)))
        assert reader.mapped == 1
        owner.kill()
        await until(lambda: reader.mapped == 0)
        error = await refusal(reader, owner.handle, [ByteRange(0, MIB)])
        assert error.code == "gone"
        assert "another source" in error.message
        with GpuOwner(LENGTH) as other, room(MIB) as memory:
            await reader.read_into(other.handle, [ByteRange(0, MIB)], memory, 0)
            assert (from_gpu(memory) == pattern(LENGTH)[:MIB]).all(), "the reader cannot read from other owners"

    play(scenario)


@pytest.mark.parametrize("command", ["withdraw", "free"])
def test_withdrawn_memory_is_gone_for_readers_that_have_mapped_it(owner: GpuOwner, command: str) -> None:
    async def scenario(reader: CudaIpcReader) -> None:
        await reader.read(owner.handle, [ByteRange(0, 1)], memoryview(bytearray(1)))
        owner.tell(command)
        assert (await refusal(reader, owner.handle, [ByteRange(0, 1)])).code == "gone"
        assert reader.mapped == 0
        assert (await refusal(reader, owner.handle, [ByteRange(0, 1)])).code == "gone"

    play(scenario)


def test_handles_with_a_wrong_field_are_refused(owner: GpuOwner) -> None:
    good = owner.handle
    cases = [
        ({"name": NAME_PREFIX + "0" * 32}, "gone"),
        ({"descriptor": 0}, "gone"),
        ({"descriptor": 10**15}, "gone"),
        ({"pid": os.getpid()}, "gone"),
        ({"pid": 2**62}, "gone"),
        ({"protocol": TRANSFER_PROTOCOL_VERSION + 1}, "version"),
        ({"allocation": b""}, "refused"),
        ({"allocation": bytes(64)}, "refused"),
        ({"offset_bytes": 1 << 40}, "refused"),
        ({"offset_bytes": -1}, "refused"),
        ({"length_bytes": 1 << 40}, "refused"),
    ]

    async def scenario(reader: CudaIpcReader) -> None:
        for changes, code in cases:
            handle = msgspec.structs.replace(good, **changes)
            assert (await refusal(reader, handle, [ByteRange(0, 1)])).code == code, changes
        for ranges in ([ByteRange(0, 2), ByteRange(LENGTH - 1, 2)], [ByteRange(-1, 1)]):
            assert (await refusal(reader, good, ranges)).code == "out_of_range"
        tcp = TcpHandle(
            protocol=TRANSFER_PROTOCOL_VERSION, owner="owner", incarnation="i", length_bytes=LENGTH, token="t"
        )
        assert (await refusal(reader, tcp, [ByteRange(0, 1)])).code == "refused"  # type: ignore[arg-type]
        with room(10) as memory:
            for at_bytes, memory_given, code in (
                (1, memory, "size"),
                (-1, memory, "size"),
                (0, GpuMemory(memory.address, 10, 1), "refused"),
            ):
                with pytest.raises(TransferError) as refused:
                    await reader.read_into(good, [ByteRange(0, 10)], memory_given, at_bytes)
                assert refused.value.code == code
            assert not from_gpu(memory).any()
            await reader.read_into(good, [ByteRange(0, 10)], memory, 0)
            assert (from_gpu(memory) == pattern(10)).all(), "the GPU cannot be used after the refusals"

    play(scenario)


def test_a_process_cannot_open_its_own_exported_memory(driver: str) -> None:
    async def scenario(reader: CudaIpcReader) -> None:
        with room(MIB) as memory:
            exporter = CudaIpcExporter("me", "i")
            error = await refusal(reader, exporter.register(memory), [ByteRange(0, 1)])
            assert error.code == "refused"
            assert "cuIpcOpenMemHandle failed with CUDA_ERROR_" in error.message
            exporter.close()

    play(scenario)


def test_mappings_are_bounded_and_descriptors_are_closed(driver: str) -> None:
    async def scenario(reader: CudaIpcReader) -> None:
        owners = [GpuOwner(MIB) for _ in range(3)]
        into = bytearray(1)
        await reader.read(owners[0].handle, [ByteRange(0, 1)], memoryview(into))
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            for owner in owners:
                into = bytearray(1)
                await reader.read(owner.handle, [ByteRange(0, 1)], memoryview(into))
                assert into == pattern(1).tobytes()
                assert reader.mapped == 1
        # The thread closes descriptors some time after the read. The real driver keeps descriptors of its own.
        await until(lambda: driver == "hardware" or len(os.listdir("/proc/self/fd")) == before)
        for owner in owners:
            owner.kill()

    play(scenario, mappings=1)


def test_memory_beyond_its_allocation_cannot_be_offered(driver: str) -> None:
    exporter = CudaIpcExporter("me", "i")
    with room(2 * MIB) as memory, pytest.raises(ConfigError, match=r"2097153 bytes of GPU memory.*ends after 2097"):
        exporter.register(GpuMemory(memory.address, memory.length_bytes + 1))
    with pytest.raises(ConfigError, match=r"cuMemGetAddressRange failed with CUDA_ERROR_\w+.*transfer.transports"):
        exporter.register(GpuMemory(4096, MIB))


def test_a_handle_has_the_offset_of_its_memory_in_the_allocation(owner: GpuOwner) -> None:
    assert owner.handle.offset_bytes == OFFSET
    assert owner.handle.length_bytes == LENGTH
    wire = msgspec.msgpack.encode(owner.handle)
    assert msgspec.msgpack.decode(wire, type=CudaIpcHandle) == owner.handle


def test_cuda_ipc_is_announced_on_a_usable_gpu_only(driver: str) -> None:
    assert unusable_reason(0) == ""
    assert local_abilities(("cuda_ipc", "tcp"), "cuda").transports == ("cuda_ipc", "tcp")
    assert local_abilities(("cuda_ipc", "tcp"), "cpu").transports == ("tcp",)
