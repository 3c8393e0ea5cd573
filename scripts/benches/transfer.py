"""Measures how fast adapters are read from a peer, by transport, and how much reads delay requests.

1. Bandwidth for slabs of 1 to 256 MiB, alternating between: a copy within the process, of the kind of memory that pools
   use (memcpy) and of ordinary memory, which may have huge pages (memcpy_ordinary); shm from another process, also
   without any pages mapped before (shm_first), a cost that an engine pays once per page; plain loopback sockets with
   recv_into (raw); tcp, which is the bus over such sockets. As in an engine, each slab has another source and target
   address than the one before, so that small slabs do not stay in the processor's cache. All memory is touched first.
   Ratios are of the worst size, in its median round.
2. verbs against perftest's ib_read_bw, in a virtual machine with a software RDMA device if there is no other.
3. Four engines of one thread each. One holds adapters of ranks 8 and 64 on all seven projections; the others read them
   over shm, over tcp and from the store, whose file is dropped from the page cache. Measured are the time to first
   token for an absent adapter and for the same adapter once resident, and the step times of running streams while 50
   adapters of a plan are loaded one after another, and while none is. The plan's loads are paced.

--quick makes fewer rounds of 1, leaves out 2 (null) and loads 26 adapters, twice, in 3.
"""

import argparse
import itertools
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt
import uvloop
from harness.remote_figures import FULL, QUICK, Remote, measure_remote
from harness.report import BenchError, Number, last_line, rounded, say, table
from harness.verbs import Slab, measure_verbs, verbs_figures, verbs_ratio, verbs_table

from loraserve.bus.zmq import open_bus
from loraserve.config import BusConfig, ClusterConfig, Config
from loraserve.errors import LoraServeError
from loraserve.testing.local_cluster import free_port
from loraserve.testing.memory_owner import NAME, MemoryOwner, pattern
from loraserve.transfer.protocol import ByteRange
from loraserve.transfer.shm import SharedMemory, ShmReader
from loraserve.transfer.tcp import TcpReader

MIB = 1 << 20
SIZES_MIB = (1, 4, 16, 64, 256)
HELD_BYTES = max(SIZES_MIB) * MIB
ROUNDS_MIB = 2048
"""The number of rounds of a size is this divided by the size, within ``FEWEST`` and ``MOST``."""
FEWEST, MOST = 9, 200
QUICK_SHARE = 4
WAYS = ("memcpy", "memcpy_ordinary", "shm", "shm_first", "raw", "tcp")
GOALS = (">= 0.8", "", "", ">= 0.6")
TIMEOUT_S = 60.0
SENDER = Path(__file__).parent / "workers" / "raw_sender.py"

Bytes = npt.NDArray[np.uint8]
Way = Callable[[Bytes, int], Awaitable[None]]


@asynccontextmanager
async def ways() -> AsyncIterator[dict[str, Way]]:
    """Yield the ways to read, by name. Each way is a function that fills a buffer with the data at an offset."""
    # The same kind of memory and page size as the owner's.
    held = SharedMemory(HELD_BYTES)
    own = np.frombuffer(held.view, np.uint8)
    own[:] = pattern(HELD_BYTES)
    ordinary = own.copy()
    with tempfile.TemporaryDirectory(prefix="ls-") as folder:
        peers = {NAME: f"tcp://127.0.0.1:{free_port()},tcp://127.0.0.1:{free_port()}"}
        config = Config(cluster=ClusterConfig(run_dir=folder), bus=BusConfig(peers=peers))
        bus = open_bus(config, "reader", None)
        with MemoryOwner(own.nbytes, config) as owner, closing(ShmReader()) as reader, sender() as raw:
            over_bus = TcpReader(bus, TIMEOUT_S)

            async def memcpy(into: Bytes, start: int) -> None:
                np.copyto(into, own[start : start + into.nbytes])

            async def memcpy_ordinary(into: Bytes, start: int) -> None:
                np.copyto(into, ordinary[start : start + into.nbytes])

            async def shm(into: Bytes, start: int) -> None:
                await reader.read(owner.shm, [ByteRange(start, into.nbytes)], into.data)

            async def shm_first(into: Bytes, start: int) -> None:
                with closing(ShmReader()) as unmapped:
                    await unmapped.read(owner.shm, [ByteRange(start, into.nbytes)], into.data)

            async def sockets(into: Bytes, start: int) -> None:
                receive(raw, into, start)

            async def tcp(into: Bytes, start: int) -> None:
                await over_bus.read(owner.tcp, [ByteRange(start, into.nbytes)], into.data)

            yield dict(zip(WAYS, (memcpy, memcpy_ordinary, shm, shm_first, sockets, tcp), strict=True))
        await bus.close()
    held.close()


def sender() -> socket.socket:
    """Start a sending process and connect to it. The process ends when the connection is closed."""
    process = subprocess.Popen([sys.executable, str(SENDER)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return socket.create_connection(("127.0.0.1", int(process.stdout.readline())))


def receive(connection: socket.socket, into: Bytes, start: int) -> None:
    connection.sendall(start.to_bytes(8, "big") + into.nbytes.to_bytes(8, "big"))
    rest = into.data
    while rest.nbytes:
        rest = rest[connection.recv_into(rest) :]


class Measured:
    """The seconds of each way for slabs of one size, by round."""

    def __init__(self, size_bytes: int, taken_s: dict[str, list[float]]) -> None:
        self._size_bytes = size_bytes
        self._taken_s = taken_s

    def bytes_per_s(self) -> dict[str, float]:
        return {name: self._size_bytes / median(times_s) for name, times_s in self._taken_s.items()}

    def over(self, ours: str, theirs: str) -> float:
        """Return the ratio of bandwidths in the median round. A slow phase of the machine affects both."""
        return median(b / a for a, b in zip(self._taken_s[ours], self._taken_s[theirs], strict=True))


def places(size_bytes: int) -> Iterator[int]:
    """Yield the offsets of successive slabs."""
    return itertools.cycle(range(0, HELD_BYTES - size_bytes + 1, size_bytes))


async def measure(size_mib: int, rounds: int, each: dict[str, Way], memory: Bytes) -> Measured:
    """Measure all ways in rounds. The order rotates, so that no way is always first."""
    size_bytes = size_mib * MIB
    taken_s: dict[str, list[float]] = {name: [] for name in each}
    place, names = places(size_bytes), list(each)
    for number in range(rounds):
        for name in [*names[number % len(names) :], *names[: number % len(names)]]:
            start = next(place)
            into = memory[start : start + size_bytes]
            began_s = time.perf_counter()
            await each[name](into, start)
            taken_s[name].append(time.perf_counter() - began_s)
    return Measured(size_bytes, taken_s)


async def bandwidth(quick: bool) -> dict[int, Measured]:
    """Return the measurements by slab size in MiB."""
    found = {}
    memory = np.empty(HELD_BYTES, np.uint8)
    async with ways() as each:
        # The first use maps memory, connects and touches pages.
        for way in each.values():
            await way(memory, 0)
        for size_mib in SIZES_MIB:
            rounds = min(max(ROUNDS_MIB // (QUICK_SHARE if quick else 1) // size_mib, FEWEST), MOST)
            say(f"slabs of {size_mib} MiB, {rounds} rounds")
            found[size_mib] = await measure(size_mib, rounds, each, memory)
    return found


def ratios(found: dict[int, Measured], verbs: list[Slab], remote: Remote | None) -> dict[str, Number]:
    """Return the ratios of the last line.

    shm_vs_memcpy compares with a copy of the same kind of memory, so that it shows the cost of the transport only.
    shm/ordinary in the table includes the cost of the smaller pages.
    """
    nothing: dict[str, Number] = {"step_growth_while_loading": None, "remote_ttft_vs_resident": None}
    return {
        "shm_vs_memcpy": rounded(min(each.over("shm", "memcpy") for each in found.values())),
        "tcp_vs_raw": rounded(min(each.over("tcp", "raw") for each in found.values())),
        "verbs_vs_ib_read_bw": verbs_ratio(verbs),
        **(remote.ratios() if remote is not None else nothing),
    }


PAIRS = {
    "shm/memcpy": ("shm", "memcpy"),
    "shm/ordinary": ("shm", "memcpy_ordinary"),
    "first/memcpy": ("shm_first", "memcpy"),
    "tcp/raw": ("tcp", "raw"),
}


def rows(found: dict[int, Measured]) -> list[list[object]]:
    return [
        [
            f"{size_mib} MiB",
            *(rate / 2**30 for rate in each.bytes_per_s().values()),
            *(each.over(*pair) for pair in PAIRS.values()),
        ]
        for size_mib, each in found.items()
    ]


def bandwidth_figures(found: dict[int, Measured]) -> dict[str, Number]:
    return {
        f"{name}_{size_mib}_mib_bytes_per_s": rate
        for size_mib, each in found.items()
        for name, rate in each.bytes_per_s().items()
    }


def engines_measured(quick: bool) -> Remote | None:
    """Return the measurements with engines. If they fail, print the reason and return None."""
    try:
        return measure_remote(QUICK if quick else FULL)
    except (BenchError, LoraServeError) as error:
        say(f"engines not measured: {error}")
        return None


def main(arguments: Sequence[str]) -> int:
    """Return 0 on success, 1 if the engines could not be measured."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench transfer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="under a minute; see above for what is left out")
    options = parser.parse_args(arguments)
    found = uvloop.run(bandwidth(options.quick))
    remote = engines_measured(options.quick)
    verbs = [] if options.quick else measure_verbs()
    print(table("GiB/s, and ratios", ["slab", *WAYS, *PAIRS], [*rows(found), ["goal", *[""] * len(WAYS), *GOALS]]))
    if verbs:
        print(verbs_table(verbs))
    if remote is not None:
        print(remote.tables())
    figures = {
        **bandwidth_figures(found),
        **verbs_figures(verbs),
        **(remote.figures() if remote is not None else {}),
    }
    print(last_line("transfer", ratios(found, verbs, remote), figures))
    return 0 if remote is not None else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
