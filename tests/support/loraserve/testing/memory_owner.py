"""A process that owns memory which others read, for tests that kill it and for benchmarks.

    python -m loraserve.testing.memory_owner LENGTH_BYTES [CONFIG]

Prints its handles as one line of JSON and serves them over shm; with a configuration (JSON) that names its bus, over
tcp too. A line on stdin makes it withdraw the handles.
"""

import asyncio
import sys

import msgspec
import numpy as np
import numpy.typing as npt
import uvloop

from loraserve.bus.zmq import open_bus
from loraserve.config import Config
from loraserve.messages import ReadRegion
from loraserve.messages.transfer import ShmHandle, TcpHandle
from loraserve.testing.owner_process import OwnerProcess
from loraserve.transfer.shm import SharedMemory, ShmExporter
from loraserve.transfer.tcp import TcpExporter

NAME = "owner"
BLOCK_BYTES = 4 << 20
"""The pattern is computed in blocks, because its numbers take four times the memory of its bytes."""


class Handles(msgspec.Struct, frozen=True, kw_only=True):
    shm: ShmHandle
    tcp: TcpHandle | None


def pattern(length_bytes: int) -> npt.NDArray[np.uint8]:
    """Return the contents of an owner's memory: no zeros, and no two neighbouring pages alike."""
    whole = np.empty(length_bytes, np.uint8)
    for start in range(0, length_bytes, BLOCK_BYTES):
        at = np.arange(start, min(start + BLOCK_BYTES, length_bytes), dtype=np.uint32)
        whole[start : start + len(at)] = (at * 7 + (at >> 8)) % 255 + 1
    return whole


class MemoryOwner(OwnerProcess):
    """The process, as its parent sees it."""

    def __init__(self, length_bytes: int, config: Config | None = None) -> None:
        command = [sys.executable, "-m", "loraserve.testing.memory_owner", str(length_bytes)]
        if config is not None:
            command.append(msgspec.json.encode(config).decode())
        super().__init__(command)
        self.handles = msgspec.json.decode(self.line(), type=Handles)

    @property
    def shm(self) -> ShmHandle:
        return self.handles.shm

    @property
    def tcp(self) -> TcpHandle:
        assert self.handles.tcp is not None, "the owner was started without a bus"
        return self.handles.tcp

    def withdraw(self) -> None:
        self.tell("withdraw")


async def own(length_bytes: int, config: Config | None) -> None:
    memory = SharedMemory(length_bytes)
    memory.view[:] = pattern(length_bytes).data
    shm = ShmExporter(NAME, "0123456789abcdef")
    bus = open_bus(config, NAME, ReadRegion) if config is not None else None
    tcp = TcpExporter(bus) if bus is not None else None
    handles = Handles(shm=shm.register(memory), tcp=tcp.register(memory.view) if tcp is not None else None)
    print(msgspec.json.encode(handles).decode(), flush=True)

    def withdraw() -> None:
        if not sys.stdin.readline():
            # The parent is gone.
            raise SystemExit
        shm.close()
        if tcp is not None:
            tcp.close()
        print("withdrawn", flush=True)

    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), withdraw)
    while bus is not None and tcp is not None:
        later = tcp.answer(await bus.receive())
        assert later is None, "reads of host memory are answered at once"
    await asyncio.Event().wait()


if __name__ == "__main__":
    given = msgspec.json.decode(sys.argv[2], type=Config) if len(sys.argv) > 2 else None
    uvloop.run(own(int(sys.argv[1]), given))
