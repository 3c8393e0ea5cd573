"""The pool's memory on a GPU: one driver allocation that torch computes with and other processes read."""

import asyncio
import gc
import hashlib
import subprocess
import sys

import msgspec
import torch

from loraserve.engine.cuda.memory import DevicePool
from loraserve.testing.gpu_owner import GpuOwner
from loraserve.testing.memory_owner import pattern
from loraserve.transfer.cuda_driver import allocation
from loraserve.transfer.cuda_ipc import CudaIpcExporter, CudaIpcReader
from loraserve.transfer.protocol import ByteRange

MIB = 1 << 20
LENGTH = 64 * MIB
START, AT, SLAB = MIB + 6, 3 * MIB + 2, 9 * MIB + 4
DEVICE = torch.device("cuda", 0)
READ = """
import asyncio, hashlib, sys, msgspec
from loraserve.transfer.cuda_ipc import CudaIpcReader
from loraserve.messages.transfer import CudaIpcHandle
from loraserve.transfer.protocol import ByteRange
handle = msgspec.json.decode(sys.argv[1], type=CudaIpcHandle)
into = bytearray(handle.length_bytes)
async def main():
    reader = CudaIpcReader(0)
    await reader.read(handle, [ByteRange(0, len(into))], memoryview(into))
    reader.close()
asyncio.run(main())
print(hashlib.sha256(into).hexdigest())
"""


def new_pool() -> DevicePool:
    return DevicePool(LENGTH // 2, torch.bfloat16, DEVICE)


def test_it_is_one_allocation_zeroed_and_free_again_with_the_last_tensor_in_it() -> None:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info(DEVICE)[0]
    pool = new_pool()
    assert pool.memory is not None
    base, size = allocation(pool.memory)
    assert (base, pool.memory.length_bytes) == (pool.tensor.data_ptr(), LENGTH)
    assert size >= LENGTH
    assert (pool.tensor.dtype, pool.tensor.numel(), pool.tensor.device) == (torch.bfloat16, LENGTH // 2, DEVICE)
    assert not pool.tensor.any()
    kept = pool.tensor[7:9]
    del pool
    gc.collect()
    assert before - torch.cuda.mem_get_info(DEVICE)[0] >= LENGTH
    assert not kept.any()
    del kept
    gc.collect()
    torch.cuda.empty_cache()
    assert before - torch.cuda.mem_get_info(DEVICE)[0] < LENGTH


def test_kernels_and_the_pools_own_copies_see_the_same_bytes() -> None:
    pool = new_pool()
    data = pattern(SLAB)
    pool.write(AT, data.data)
    pool.tensor[:100].fill_(1.0)
    torch.cuda.synchronize()
    into = bytearray(SLAB)
    pool.read_into(AT, memoryview(into))
    assert into == data.tobytes()
    digest = hashlib.sha256()
    pool.digest(digest, AT, SLAB)
    assert digest.digest() == hashlib.sha256(into).digest()
    assert pool.tensor[:100].sum().item() == 100


def test_kernels_see_what_was_read_from_a_peer() -> None:
    pool = new_pool()
    assert pool.memory is not None
    memory = pool.memory

    async def read(owner: GpuOwner) -> None:
        reader = CudaIpcReader(0)
        await reader.read_into(owner.handle, [ByteRange(START, SLAB)], memory, AT)
        reader.close()

    with GpuOwner(LENGTH) as owner:
        asyncio.run(read(owner))
    truth = torch.from_numpy(pattern(LENGTH)[START : START + SLAB].copy()).to(DEVICE)
    found = pool.tensor.view(torch.uint8)
    assert torch.equal(found[AT : AT + SLAB], truth)
    assert not found[:AT].any()
    assert not found[AT + SLAB :].any()


def test_another_process_reads_the_pool() -> None:
    pool = new_pool()
    assert pool.memory is not None
    pool.write(0, pattern(LENGTH).data)
    exporter = CudaIpcExporter("me", "i")
    handle = msgspec.json.encode(exporter.register(pool.memory)).decode()
    done = subprocess.run([sys.executable, "-c", READ, handle], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == hashlib.sha256(pattern(LENGTH)).hexdigest()
    exporter.close()
