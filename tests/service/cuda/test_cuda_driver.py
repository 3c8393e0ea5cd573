"""Situations that only the fake driver can produce: GPUs without peer access, refusals, slow copies."""

import asyncio
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import pytest

from loraserve.errors import ConfigError
from loraserve.testing.gpu_owner import GpuOwner, from_gpu, to_gpu
from loraserve.testing.gpu_reads import KILLS, READS_AT_A_KILL, report
from loraserve.testing.memory_owner import pattern
from loraserve.transfer.abilities import local_abilities
from loraserve.transfer.cuda_driver import (
    OTHER_LIBRARY,
    CudaCallError,
    GpuMemory,
    allocate,
    call,
    device_count,
    device_name,
    device_uuid,
    free,
)
from loraserve.transfer.cuda_ipc import CudaIpcReader, unusable_reason
from loraserve.transfer.protocol import ByteRange, TransferError
from loraserve.transfer.verbs.device import dma_buf, dma_buf_works, flush_remote_writes

MIB = 1 << 20
LENGTH = 4 * MIB
Setting = Callable[[str, int], None]


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OTHER_LIBRARY, "/none/such.so")
    with pytest.raises(ConfigError, match=r"there is no CUDA driver.*/none/such\.so"):
        allocate(MIB, 0)
    assert "there is no CUDA driver" in unusable_reason(0)
    assert not dma_buf_works(0)
    assert local_abilities(("cuda_ipc", "tcp"), "cuda").transports == ("tcp",)


def test_a_library_that_is_not_a_driver_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OTHER_LIBRARY, "libc.so.6")
    with pytest.raises(ConfigError, match=r"there is no CUDA driver, or it is older than.*cuInit"):
        device_count()


def test_errors_have_the_names_of_the_driver(fake_driver: None, setting: Setting) -> None:
    setting("BYTES", 4 * MIB)
    with pytest.raises(CudaCallError, match="cuMemAlloc failed with CUDA_ERROR_OUT_OF_MEMORY") as failed:
        allocate(4 * MIB + 1, 0)
    assert failed.value.name == "CUDA_ERROR_OUT_OF_MEMORY"
    with pytest.raises(CudaCallError, match="cuDeviceGet failed with CUDA_ERROR_INVALID_DEVICE"):
        allocate(MIB, 1)
    with pytest.raises(CudaCallError, match="cuStreamSynchronize failed with CUDA_ERROR_INVALID_CONTEXT"):
        call("cuStreamSynchronize", None)
    memory = allocate(4 * MIB, 0)
    free(memory)
    free(allocate(4 * MIB, 0))
    with pytest.raises(CudaCallError, match="cuMemFree failed with CUDA_ERROR_INVALID_VALUE"):
        free(memory)


def test_calls_in_any_thread_use_the_gpu_of_the_memory(fake_driver: None, setting: Setting) -> None:
    setting("DEVICES", 2)
    assert device_count() == 2
    assert (device_name(0), device_name(1)) == ("software GPU 0", "software GPU 1")
    assert device_uuid(0) != device_uuid(1)
    data = pattern(MIB)

    def round_trip(device: int) -> bool:
        memory = allocate(MIB, device)
        to_gpu(memory, data)
        same = bool((from_gpu(memory) == data).all())
        free(memory)
        return same

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(round_trip, [0, 1] * 10))


def test_memory_that_cannot_be_exported_is_not_announced(setting: Setting) -> None:
    setting("IPC", 0)
    assert unusable_reason(0) == "cuIpcGetMemHandle failed with CUDA_ERROR_NOT_SUPPORTED"
    assert local_abilities(("cuda_ipc", "shm"), "cuda").transports == ("shm",)
    setting("IPC", 1)
    assert local_abilities(("cuda_ipc", "shm"), "cuda", gpu=0).transports == ("cuda_ipc", "shm")
    assert local_abilities(("cuda_ipc", "shm"), "cuda", gpu=1).transports == ("shm",), "there is no such GPU"


async def read(device: int, owner: GpuOwner) -> bool:
    """Return whether this GPU reads the right bytes from the owner."""
    reader = CudaIpcReader(device)
    memory = allocate(LENGTH, device)
    try:
        await reader.read_into(owner.handle, [ByteRange(0, LENGTH)], memory, 0)
        return bool((from_gpu(memory) == pattern(LENGTH)).all())
    finally:
        reader.close()
        free(memory)


@pytest.mark.parametrize(
    ("first", "reach", "why"),
    [
        (0, 1, ""),
        (0, 0, "GPU 1 cannot access the memory of GPU 0"),
        (1, 1, "cuIpcOpenMemHandle failed with CUDA_ERROR_INVALID_DEVICE"),
    ],
)
def test_memory_of_another_gpu_is_read_or_refused_with_the_reason(
    setting: Setting, first: int, reach: int, why: str
) -> None:
    with GpuOwner(LENGTH) as owner:
        setting("DEVICES", 2)
        setting("FIRST", first)
        setting("REACH", reach)
        if not why:
            assert asyncio.run(read(1, owner))
            return
        with pytest.raises(TransferError) as refused:
            asyncio.run(read(1, owner))
        assert refused.value.code == "refused"
        assert why in refused.value.message


def test_a_cancelled_read_writes_no_more(setting: Setting) -> None:
    async def main(owner: GpuOwner) -> None:
        reader = CudaIpcReader(0)
        first, second = allocate(LENGTH, 0), allocate(LENGTH, 0)
        ranges = [ByteRange(0, LENGTH)]
        reads = [asyncio.create_task(reader.read_into(owner.handle, ranges, into, 0)) for into in (first, second)]
        await asyncio.sleep(0.1)
        for each in reads:
            each.cancel()
        done = await asyncio.gather(*reads, return_exceptions=True)
        assert all(isinstance(each, asyncio.CancelledError) for each in done)
        for memory in (first, second):
            to_gpu(memory, np.zeros(LENGTH, np.uint8))
        await reader.read(owner.handle, [ByteRange(0, 1)], memoryview(bytearray(1)))
        assert not from_gpu(first).any()
        assert not from_gpu(second).any()
        reader.close()

    with GpuOwner(LENGTH) as owner:
        setting("COPY_US", 500_000)
        asyncio.run(main(owner))


def test_a_read_fails_if_its_owner_dies_meanwhile(setting: Setting) -> None:
    async def main(owner: GpuOwner) -> None:
        reader = CudaIpcReader(0)
        task = asyncio.create_task(reader.read(owner.handle, [ByteRange(0, LENGTH)], memoryview(bytearray(LENGTH))))
        await asyncio.sleep(0.1)
        owner.kill()
        with pytest.raises(TransferError) as failed:
            await task
        assert failed.value.code == "gone"
        assert reader.mapped == 0
        reader.close()

    with GpuOwner(LENGTH) as owner:
        setting("COPY_US", 500_000)
        asyncio.run(main(owner))


def test_a_read_fails_if_its_owner_dies_before_its_memory_is_opened(setting: Setting) -> None:
    async def main(owner: GpuOwner, other: GpuOwner) -> None:
        reader = CudaIpcReader(0)
        first, second = (
            asyncio.create_task(reader.read(each.handle, [ByteRange(0, 1)], memoryview(bytearray(1))))
            for each in (other, owner)
        )
        await asyncio.sleep(0.1)
        owner.kill()
        await first
        with pytest.raises(TransferError, match="gone"):
            await second
        reader.close()

    with GpuOwner(LENGTH) as owner, GpuOwner(LENGTH) as other:
        setting("COPY_US", 500_000)
        asyncio.run(main(owner, other))


@pytest.mark.parametrize(("start", "length"), [(0, MIB), (100, 5), (mmap.PAGESIZE, mmap.PAGESIZE + 1)])
def test_a_dma_buf_has_the_whole_pages_around_the_memory(fake_driver: None, start: int, length: int) -> None:
    whole = allocate(2 * MIB, 0)
    to_gpu(whole, pattern(2 * MIB))
    assert dma_buf_works(0)
    before = len(os.listdir("/proc/self/fd"))
    with dma_buf(GpuMemory(whole.address + start, length)) as (descriptor, offset):
        # The fake driver returns a dma-buf of the whole allocation, a real one a dma-buf of the requested pages.
        at = start // mmap.PAGESIZE * mmap.PAGESIZE + offset
        assert os.pread(descriptor, length, at) == pattern(2 * MIB)[start : start + length].tobytes()
    assert len(os.listdir("/proc/self/fd")) == before
    flush_remote_writes(0)
    free(whole)
    with pytest.raises(ConfigError, match=r"cuMemGetHandleForAddressRange failed with CUDA_ERROR_INVALID_VALUE.*open"):
        dma_buf(whole).__enter__()


def test_a_refusal_has_the_drivers_error_and_the_next_read_works(fake_driver: None) -> None:
    async def main(owner: GpuOwner) -> None:
        reader = CudaIpcReader(0)
        for changes, at in (({"allocation": b"\x01" * 64}, 0), ({"length_bytes": 64 * MIB}, 64 * MIB - 1)):
            handle = msgspec.structs.replace(owner.handle, **changes)
            into = bytearray(2)
            with pytest.raises(TransferError, match=r"refused.*(CUDA_ERROR_INVALID_VALUE|that its handle opens); use"):
                await reader.read(handle, [ByteRange(0, 1), ByteRange(at, 1)], memoryview(into))
            await reader.read(owner.handle, [ByteRange(0, 2)], memoryview(into))
            assert into == pattern(2).tobytes()
            assert reader.mapped == 1, "a mapping that failed was kept"
        reader.close()

    with GpuOwner(LENGTH) as owner:
        asyncio.run(main(owner))


def test_the_report_on_reads_of_a_gpu_is_complete(fake_driver: None, setting: Setting) -> None:
    """scripts/gpu_check runs the report on a GPU. This test only finds faults of the report itself."""
    setting("COPY_US", 1000)
    found = report(4 * MIB)
    assert (found.gpu, found.cuda_ipc_error, found.cuda_ipc_is_correct) == ("software GPU 0", "", True)
    assert found.owners_killed_while_read is not None
    assert found.owners_killed_while_read.keys() == {"whole", "gone"}
    assert sum(found.owners_killed_while_read.values()) == KILLS * READS_AT_A_KILL
    assert found.is_correct_after_kills
    assert (found.dma_buf, found.dma_buf_error) == (True, "")
    assert (found.rdma_registered is None) == found.rdma_error.startswith("not tried: ")
    setting("IPC", 0)
    found = report(4 * MIB)
    assert "CUDA_ERROR_NOT_SUPPORTED" in found.cuda_ipc_error
    assert found.cuda_ipc_gb_s is None


def test_without_a_gpu_there_is_no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OTHER_LIBRARY, "/none/such.so")
    done = subprocess.run([sys.executable, "-m", "loraserve.testing.gpu_reads"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("not run: there is no CUDA driver")
