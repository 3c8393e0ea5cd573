"""A process that owns memory which others read by RDMA, for tests inside the virtual machine.

Forking avoids the imports, which take a new process there about twenty seconds.
"""

import asyncio
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import TracebackType

import msgspec
import numpy as np
import numpy.typing as npt

from loraserve.bus.zmq import open_bus
from loraserve.config import Config
from loraserve.messages import ConnectQueue
from loraserve.messages.transfer import VerbsHandle
from loraserve.testing.memory_owner import NAME
from loraserve.transfer.verbs.device import RdmaDevice
from loraserve.transfer.verbs.exporter import VerbsExporter

FORK = get_context("fork")
PATIENCE_S = 60.0

Bytes = npt.NDArray[np.uint8]


class VerbsOwner:
    """The process, as its parent sees it; killed at the end of the ``with`` block. Start it before opening a device."""

    def __init__(self, data: Bytes, config: Config, name: str = NAME) -> None:
        self._orders, theirs = FORK.Pipe()
        self.process = FORK.Process(target=_run, args=(data, config, name, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.handle = msgspec.json.decode(self._receive(), type=VerbsHandle)

    def __enter__(self) -> "VerbsOwner":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.kill()

    def kill(self) -> None:
        """Send SIGKILL and wait for the end of the process."""
        self.process.kill()
        self.process.join()

    def withdraw(self) -> None:
        """Make the process withdraw its memory and live on."""
        self._do("withdraw")

    def forget(self, peer: str, incarnation: str = "") -> None:
        self._do(f"forget {peer} {incarnation}")

    def serving(self) -> int:
        """Return the number of connected peers."""
        return int(self._do("serving"))

    def _do(self, order: str) -> str:
        self._orders.send(order)
        return self._receive()

    def _receive(self) -> str:
        assert self._orders.poll(PATIENCE_S), "the owner does not answer"
        return str(self._orders.recv())


def _run(data: Bytes, config: Config, name: str, orders: Connection) -> None:
    asyncio.run(_own(data, config, name, orders))


async def _own(data: Bytes, config: Config, name: str, orders: Connection) -> None:
    memory = data.copy()
    bus = open_bus(config, name, ConnectQueue)
    exporter = VerbsExporter(bus, RdmaDevice())
    orders.send(msgspec.json.encode(exporter.register(memory.data)).decode())
    does: dict[str, Callable[..., object]] = {
        "withdraw": exporter.close,
        "forget": exporter.forget,
        "serving": lambda: exporter.serving,
    }

    def obey() -> None:
        order, *words = orders.recv().split()
        orders.send(does[order](*words))

    asyncio.get_running_loop().add_reader(orders.fileno(), obey)
    while True:
        await exporter.answer(await bus.receive())
