"""A process that owns memory of a GPU which others read: for tests that kill it and benches that measure it.

    python -m loraserve.testing.gpu_owner LENGTH_BYTES DEVICE

Prints its handle as one line of JSON. On the line ``withdraw`` it withdraws it, on ``free`` also gives the memory back.
It ends with whoever started it.
"""

import sys

import msgspec
import numpy as np
import numpy.typing as npt

from loraserve.messages.transfer import CudaIpcHandle
from loraserve.testing.memory_owner import pattern
from loraserve.testing.owner_process import OwnerProcess
from loraserve.transfer.cuda_driver import GpuMemory, allocate, call, current_device, free
from loraserve.transfer.cuda_ipc import CudaIpcExporter

NAME = "owner"
OFFSET = 12_345
"""The region does not begin where its allocation does."""

Bytes = npt.NDArray[np.uint8]


class GpuOwner(OwnerProcess):
    """Such a process, from outside."""

    def __init__(self, length_bytes: int, device: int = 0, environment: dict[str, str] | None = None) -> None:
        module = "loraserve.testing.gpu_owner"
        super().__init__([sys.executable, "-m", module, str(length_bytes), str(device)], environment)
        self.handle = msgspec.json.decode(self.line(), type=CudaIpcHandle)

    def tell(self, command: str) -> str:
        answer = super().tell(command)
        assert answer == command + "\n"
        return answer


def to_gpu(memory: GpuMemory, data: Bytes) -> None:
    """Writes the beginning of it."""
    with current_device(memory.device):
        call("cuMemcpyHtoD_v2", memory.address, data.ctypes.data, data.nbytes)


def from_gpu(memory: GpuMemory) -> Bytes:
    """All that lies there."""
    data = np.empty(memory.length_bytes, np.uint8)
    with current_device(memory.device):
        call("cuMemcpyDtoH_v2", data.ctypes.data, memory.address, data.nbytes)
    return data


def own(length_bytes: int, device: int) -> None:
    whole = allocate(OFFSET + length_bytes, device)
    region = GpuMemory(whole.address + OFFSET, length_bytes, device)
    to_gpu(region, pattern(length_bytes))
    exporter = CudaIpcExporter(NAME, "0123456789abcdef")
    print(msgspec.json.encode(exporter.register(region)).decode(), flush=True)
    for line in sys.stdin:
        exporter.close()
        if line == "free\n":
            free(whole)
        print(line, end="", flush=True)


if __name__ == "__main__":
    own(int(sys.argv[1]), int(sys.argv[2]))
