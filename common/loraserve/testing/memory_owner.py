"""A process that owns memory which others read: for tests that kill it and benches that measure it.

    python -m loraserve.testing.memory_owner LENGTH_BYTES [CONFIG]

Prints its handles as one line of JSON, serves them over shm and, with a configuration (JSON) that says where its bus
is, over tcp, and withdraws them when a line comes in.
"""

import asyncio
import subprocess
import sys
from types import TracebackType

import msgspec
import numpy as np
import numpy.typing as npt

from loraserve.bus.zmq import open_bus
from loraserve.config import Config
from loraserve.messages import ReadRegion
from loraserve.transfer.protocol import ShmHandle, TcpHandle
from loraserve.transfer.shared_memory import SharedMemory
from loraserve.transfer.shm import ShmExporter
from loraserve.transfer.tcp import TcpExporter

NAME = "owner"


class Handles(msgspec.Struct, frozen=True, kw_only=True):
    shm: ShmHandle
    tcp: TcpHandle | None


def pattern(length_bytes: int) -> npt.NDArray[np.uint8]:
    """What such an owner's memory holds: no zeros, and no two neighbouring pages alike."""
    at = np.arange(length_bytes, dtype=np.uint32)
    return ((at * 7 + (at >> 8)) % 255 + 1).astype(np.uint8)


class MemoryOwner:
    """Such a process, from outside; it is killed at the end at the latest."""

    def __init__(self, length_bytes: int, config: Config | None = None) -> None:
        command = [sys.executable, "-m", "loraserve.testing.memory_owner", str(length_bytes)]
        if config is not None:
            command.append(msgspec.json.encode(config).decode())
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.handles = msgspec.json.decode(self._line(), type=Handles)

    def __enter__(self) -> "MemoryOwner":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.kill()

    @property
    def shm(self) -> ShmHandle:
        return self.handles.shm

    @property
    def tcp(self) -> TcpHandle:
        assert self.handles.tcp is not None, "it was started without a bus"
        return self.handles.tcp

    def withdraw(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("withdraw\n")
        self.process.stdin.flush()
        self._line()

    def kill(self) -> None:
        """kill -9, and returns when it is over."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


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
        tcp.answer(await bus.receive())
    await asyncio.Event().wait()


if __name__ == "__main__":
    given = msgspec.json.decode(sys.argv[2], type=Config) if len(sys.argv) > 2 else None
    asyncio.run(own(int(sys.argv[1]), given))
