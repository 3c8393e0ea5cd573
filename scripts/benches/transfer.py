"""How fast a peer's memory is read, by transport: over a plain copy of as much, and over plain sockets.

For slabs of 1 to 256 MiB, read again and again into the same buffer, all ways in turn: a plain copy within the process;
shm from another process (also where nothing of it was mapped before, which each engine pays once for each page);
sockets over loopback with nothing but recv_into; tcp, that is the bus over such sockets. The two ratios are those of
the size that does worst, in its median round. What verbs, steps and whole requests take is not measured yet.
"""

import argparse
import asyncio
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt
from harness.report import Number, last_line, rounded, say, table

from loraserve.bus.zmq import open_bus
from loraserve.config import BusConfig, ClusterConfig, Config
from loraserve.testing.local_cluster import free_port
from loraserve.testing.memory_owner import NAME, MemoryOwner, pattern
from loraserve.transfer.protocol import Range
from loraserve.transfer.shm import ShmReader
from loraserve.transfer.tcp import TcpReader

MIB = 1 << 20
SIZES_MIB = (1, 4, 16, 64, 256)
ROUNDS_MIB = 2048
"""Of each size as many rounds as this is large, within bounds."""
FEWEST, MOST = 9, 200
QUICK_SHARE = 4
WAYS = ("memcpy", "shm", "shm_first", "raw", "tcp")
GOALS = (">= 0.8", "", ">= 0.6")
TIMEOUT_S = 60.0
SENDER = Path(__file__).parent / "workers" / "raw_sender.py"

Bytes = npt.NDArray[np.uint8]
Way = Callable[[Bytes], Awaitable[None]]


@asynccontextmanager
async def ways() -> AsyncIterator[dict[str, Way]]:
    """Each fills a buffer with the beginning of what somebody holds."""
    own = pattern(max(SIZES_MIB) * MIB)
    with tempfile.TemporaryDirectory(prefix="ls-") as folder:
        peers = {NAME: f"tcp://127.0.0.1:{free_port()},tcp://127.0.0.1:{free_port()}"}
        config = Config(cluster=ClusterConfig(run_dir=folder), bus=BusConfig(peers=peers))
        bus = open_bus(config, "reader", None)
        with MemoryOwner(own.nbytes, config) as owner, closing(ShmReader()) as reader, sender() as raw:
            over_bus = TcpReader(bus, TIMEOUT_S)

            async def memcpy(into: Bytes) -> None:
                np.copyto(into, own[: into.nbytes])

            async def shm(into: Bytes) -> None:
                await reader.read(owner.shm, [Range(0, into.nbytes)], into.data)

            async def shm_first(into: Bytes) -> None:
                with closing(ShmReader()) as unmapped:
                    await unmapped.read(owner.shm, [Range(0, into.nbytes)], into.data)

            async def sockets(into: Bytes) -> None:
                receive(raw, into)

            async def tcp(into: Bytes) -> None:
                await over_bus.read(owner.tcp, [Range(0, into.nbytes)], into.data)

            yield dict(zip(WAYS, (memcpy, shm, shm_first, sockets, tcp), strict=True))
        await bus.close()


def sender() -> socket.socket:
    """A connection to a process that sends; it ends with the connection."""
    process = subprocess.Popen([sys.executable, str(SENDER)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return socket.create_connection(("127.0.0.1", int(process.stdout.readline())))


def receive(connection: socket.socket, into: Bytes) -> None:
    connection.sendall(into.nbytes.to_bytes(8, "big"))
    rest = into.data
    while rest.nbytes:
        rest = rest[connection.recv_into(rest) :]


class Measured:
    """Seconds that each way took for slabs of one size, round by round."""

    def __init__(self, size_bytes: int, taken_s: dict[str, list[float]]) -> None:
        self._size_bytes = size_bytes
        self._taken_s = taken_s

    def bytes_per_s(self) -> dict[str, float]:
        return {name: self._size_bytes / median(times_s) for name, times_s in self._taken_s.items()}

    def over(self, ours: str, theirs: str) -> float:
        """Bandwidth over bandwidth, in the median round: what slows the machine down for a while slows both."""
        return median(b / a for a, b in zip(self._taken_s[ours], self._taken_s[theirs], strict=True))


async def measure(size_mib: int, rounds: int, each: dict[str, Way]) -> Measured:
    into = np.empty(size_mib * MIB, np.uint8)
    taken_s: dict[str, list[float]] = {name: [] for name in each}
    for number in range(rounds + 1):
        for name, way in each.items():
            began_s = time.perf_counter()
            await way(into)
            # The first round maps, connects and touches.
            if number:
                taken_s[name].append(time.perf_counter() - began_s)
    return Measured(into.nbytes, taken_s)


async def run(quick: bool) -> dict[int, Measured]:
    found = {}
    async with ways() as each:
        for size_mib in SIZES_MIB:
            rounds = min(max(ROUNDS_MIB // (QUICK_SHARE if quick else 1) // size_mib, FEWEST), MOST)
            say(f"slabs of {size_mib} MiB, {rounds} rounds")
            found[size_mib] = await measure(size_mib, rounds, each)
    return found


def ratios(found: dict[int, Measured]) -> dict[str, Number]:
    return {
        "shm_vs_memcpy": rounded(min(each.over("shm", "memcpy") for each in found.values())),
        "tcp_vs_raw": rounded(min(each.over("tcp", "raw") for each in found.values())),
        "verbs_vs_ib_read_bw": None,
        "step_growth_while_loading": None,
        "remote_ttft_vs_resident": None,
    }


PAIRS = {"shm/memcpy": ("shm", "memcpy"), "first/memcpy": ("shm_first", "memcpy"), "tcp/raw": ("tcp", "raw")}


def rows(found: dict[int, Measured]) -> list[list[object]]:
    return [
        [
            f"{size_mib} MiB",
            *(rate / 2**30 for rate in each.bytes_per_s().values()),
            *(each.over(*pair) for pair in PAIRS.values()),
        ]
        for size_mib, each in found.items()
    ]


def main(arguments: Sequence[str]) -> int:
    """Returns 0 once the line is printed."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench transfer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    options = parser.parse_args(arguments)
    found = asyncio.run(run(options.quick))
    print(table("GiB/s, and ratios", ["slab", *WAYS, *PAIRS], [*rows(found), ["goal", *[""] * len(WAYS), *GOALS]]))
    figures = {
        f"{name}_{size_mib}_mib_bytes_per_s": rate
        for size_mib, each in found.items()
        for name, rate in each.bytes_per_s().items()
    }
    print(last_line("transfer", ratios(found), figures))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
