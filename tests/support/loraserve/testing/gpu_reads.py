"""Check how peers can read this machine's GPU: CUDA IPC between processes, dma-buf, registration with an RDMA device.

    python -m loraserve.testing.gpu_reads

Prints one line of JSON: the hardware, the reads that worked with their speed, and the reasons of failures.
scripts/gpu_check runs this module.
"""

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Callable

import msgspec

from loraserve.errors import ConfigError
from loraserve.testing.gpu_owner import GpuOwner, from_gpu
from loraserve.testing.memory_owner import pattern
from loraserve.transfer.cuda_driver import CudaCallError, GpuMemory, allocate, device_name, free
from loraserve.transfer.cuda_ipc import CudaIpcReader, unusable_reason
from loraserve.transfer.protocol import ByteRange, TransferError
from loraserve.transfer.verbs import device as verbs_device
from loraserve.transfer.verbs.device import RdmaDevice, dma_buf, dma_buf_works, peermem_works

SLAB_BYTES = 256 << 20
READS = 10
KILLS = 10
READS_AT_A_KILL = 50
"""Reads that are started before the owner is killed, so that it dies during one of them."""


class GpuReadsReport(msgspec.Struct, kw_only=True):
    """The results. A field is None if it could not be measured, and the matching ``..._error`` has the reason."""

    gpu: str
    cuda_ipc_error: str
    cuda_ipc_is_correct: bool | None = None
    cuda_ipc_gb_s: float | None = None
    owners_killed_while_read: dict[str, int] | None = None
    is_correct_after_kills: bool | None = None
    dma_buf: bool
    dma_buf_error: str
    peermem: bool
    rdma_device: str
    rdma_registered: bool | None
    rdma_error: str


def report(slab_bytes: int) -> GpuReadsReport:
    """Run all checks and return the report. Raises ConfigError or CudaCallError if there is no GPU."""
    memory = allocate(slab_bytes, 0)
    dma_buf_error = _error_of(lambda: _try_dma_buf(memory))
    device, registered, rdma_error = _try_registration(memory)
    found = GpuReadsReport(
        gpu=device_name(0),
        cuda_ipc_error=unusable_reason(0),
        dma_buf=not dma_buf_error,
        dma_buf_error=dma_buf_error,
        peermem=peermem_works(),
        rdma_device=device,
        rdma_registered=registered,
        rdma_error=rdma_error,
    )
    if not found.cuda_ipc_error:
        asyncio.run(_check_cuda_ipc(found, memory))
    free(memory)
    return found


async def _check_cuda_ipc(found: GpuReadsReport, memory: GpuMemory) -> None:
    reader, whole = CudaIpcReader(0), [ByteRange(0, memory.length_bytes)]
    with GpuOwner(memory.length_bytes) as owner:
        took_s = []
        for _ in range(READS):
            started_s = time.monotonic()
            await reader.read_into(owner.handle, whole, memory, 0)
            took_s.append(time.monotonic() - started_s)
        found.cuda_ipc_is_correct = _is_correct(memory)
        found.cuda_ipc_gb_s = memory.length_bytes / min(took_s) / 1e9
    outcomes = [await _read_killed_owner(reader, memory) for _ in range(KILLS)]
    found.owners_killed_while_read = dict(sum(outcomes, Counter[str]()))
    with GpuOwner(memory.length_bytes) as owner:
        await reader.read_into(owner.handle, whole, memory, 0)
    found.is_correct_after_kills = _is_correct(memory)
    reader.close()


async def _read_killed_owner(reader: CudaIpcReader, memory: GpuMemory) -> Counter[str]:
    """Kill an owner during reads of its memory and count how the reads end."""
    whole = [ByteRange(0, memory.length_bytes)]
    with GpuOwner(memory.length_bytes) as owner:
        reads = [reader.read_into(owner.handle, whole, memory, 0) for _ in range(READS_AT_A_KILL)]
        tasks = [asyncio.create_task(read) for read in reads]
        await tasks[0]
        owner.kill()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    for error in ended:
        if error is not None and not isinstance(error, TransferError):
            raise error
    return Counter(error.code if isinstance(error, TransferError) else "whole" for error in ended)


def _is_correct(memory: GpuMemory) -> bool:
    return bool((from_gpu(memory) == pattern(memory.length_bytes)).all())


def _try_dma_buf(memory: GpuMemory) -> None:
    if not dma_buf_works(memory.device):
        raise ConfigError("the CUDA driver does not support dma-buf on this GPU")
    with dma_buf(memory):
        pass


def _try_registration(memory: GpuMemory) -> tuple[str, bool | None, str]:
    """Return the RDMA device, whether it registers the memory for reads and writes, and the error."""
    reason = verbs_device.unusable_reason()
    if reason:
        return "", None, f"not tried: {reason}"
    device = RdmaDevice()
    try:
        error = _error_of(lambda: _register(device, memory))
    finally:
        device.close()
    return device.port.device, not error, error


def _register(device: RdmaDevice, memory: GpuMemory) -> None:
    for place in (device.readable(memory), device.writable(memory)):
        place.close()


def _error_of(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except (ConfigError, CudaCallError) as error:
        return str(error)
    return ""


if __name__ == "__main__":
    try:
        print(msgspec.json.encode(report(SLAB_BYTES)).decode())
    except (ConfigError, CudaCallError) as error:
        sys.exit(f"not run: {error}")
