"""A process that owns GPU memory which others read, for tests that kill it and for benchmarks.

    python -m loraserve.testing.gpu_owner LENGTH_BYTES DEVICE

Prints its handle as one line of JSON. The line ``withdraw`` makes it withdraw the handle, ``free`` also free the
memory. It ends when its stdin is closed.
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
"""Start of the region in its allocation: readers must not assume that it is 0."""

Bytes = npt.NDArray[np.uint8]


class GpuOwner(OwnerProcess):
    """The process, as its parent sees it."""

    def __init__(self, length_bytes: int, device: int = 0, environment: dict[str, str] | None = None) -> None:
        module = "loraserve.testing.gpu_owner"
        super().__init__([sys.executable, "-m", module, str(length_bytes), str(device)], environment)
        self.handle = msgspec.json.decode(self.line(), type=CudaIpcHandle)

    def tell(self, command: str) -> str:
        answer = super().tell(command)
        assert answer == command + "\n"
        return answer


def to_gpu(memory: GpuMemory, data: Bytes) -> None:
    """Copy ``data`` to the beginning of the memory."""
    with current_device(memory.device):
        call("cuMemcpyHtoD_v2", memory.address, data.ctypes.data, data.nbytes)


def from_gpu(memory: GpuMemory) -> Bytes:
    """Return the contents of the memory."""
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
