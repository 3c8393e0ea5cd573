"""A process that owns memory which others read: for tests that kill it and benches that measure it.

    python -m loraserve.testing.memory_owner LENGTH_BYTES [CONFIG]

Prints its handles as one line of JSON, serves them over shm and, with a configuration (JSON) that says where its bus
is, over tcp, and withdraws them when a line comes in.
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
"""Made at a time: numbers take four times as much as the bytes that they become."""


class Handles(msgspec.Struct, frozen=True, kw_only=True):
    shm: ShmHandle
    tcp: TcpHandle | None


def pattern(length_bytes: int) -> npt.NDArray[np.uint8]:
    """What such an owner's memory holds: no zeros, and no two neighbouring pages alike."""
    whole = np.empty(length_bytes, np.uint8)
    for start in range(0, length_bytes, BLOCK_BYTES):
        at = np.arange(start, min(start + BLOCK_BYTES, length_bytes), dtype=np.uint32)
        whole[start : start + len(at)] = (at * 7 + (at >> 8)) % 255 + 1
    return whole


class MemoryOwner(OwnerProcess):
    """Such a process, from outside."""

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
        assert self.handles.tcp is not None, "it was started without a bus"
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
            # Whoever started it is gone.
            raise SystemExit
        shm.close()
        if tcp is not None:
            tcp.close()
        print("withdrawn", flush=True)

    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), withdraw)
    while bus is not None and tcp is not None:
        later = tcp.answer(await bus.receive())
        assert later is None, "host memory is answered for at once"
    await asyncio.Event().wait()


if __name__ == "__main__":
    given = msgspec.json.decode(sys.argv[2], type=Config) if len(sys.argv) > 2 else None
    uvloop.run(own(int(sys.argv[1]), given))
