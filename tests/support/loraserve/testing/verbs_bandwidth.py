"""Measure the bandwidth of our RDMA reads, beside perftest's ib_read_bw over the same device.

    python -m loraserve.testing.verbs_bandwidth [SLAB_MIB ...]

Both run in turn, five times, with the same message size. Prints one line of JSON: median MiB/s by slab, and the ratio.
"""

import asyncio
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import msgspec
import numpy as np

from loraserve.bus.zmq import open_bus
from loraserve.config import ClusterConfig, Config
from loraserve.messages.transfer import VerbsHandle
from loraserve.testing.memory_owner import pattern
from loraserve.testing.verbs_owner import VerbsOwner
from loraserve.transfer.protocol import ByteRange
from loraserve.transfer.verbs.device import RdmaDevice, RegisteredMemory
from loraserve.transfer.verbs.reader import PIECE_BYTES, VerbsReader

MIB = 1 << 20
ROUNDS = 5
MIN_MIB = 32
"""Shorter slabs are read repeatedly, at least this much in total."""
TIMEOUT_S = 30.0
PERFTEST = "ib_read_bw"
FIGURES = re.compile(r"^\s*\d+\s+\d+\s+[\d.]+\s+([\d.]+)\s+[\d.]+", re.MULTILINE)


class Bandwidth(msgspec.Struct, frozen=True, kw_only=True):
    """MiB/s for one slab size; ``ib_read_bw`` is None if perftest is not installed."""

    slab_mib: int
    verbs: float
    ib_read_bw: float | None

    @property
    def ratio(self) -> float | None:
        return None if self.ib_read_bw is None else self.verbs / self.ib_read_bw


def perftest_mib_per_s(device: str, message_bytes: int, messages: int) -> float | None:
    """Run perftest between two processes and return its figure, None if it is not installed."""
    if shutil.which(PERFTEST) is None:
        return None
    command = [PERFTEST, "-d", device, "-s", str(message_bytes), "-n", str(messages), "-F"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            return _client(command, server)
        finally:
            server.kill()


def _client(command: list[str], server: "subprocess.Popen[bytes]") -> float:
    ends_s = time.monotonic() + TIMEOUT_S
    while True:
        done = subprocess.run([*command, "127.0.0.1"], capture_output=True, text=True, timeout=TIMEOUT_S)
        found = FIGURES.search(done.stdout)
        if found:
            return float(found[1])
        # The server may not listen yet.
        if server.poll() is not None or time.monotonic() > ends_s:
            raise RuntimeError(f"{PERFTEST} gave no figures:\n{done.stdout}{done.stderr}")
        time.sleep(0.1)


async def verbs_mib_per_s(reader: VerbsReader, handle: VerbsHandle, place: RegisteredMemory, slab_bytes: int) -> float:
    """Read slabs concurrently, MIN_MIB in total, and return the MiB/s."""
    times = max(1, MIN_MIB * MIB // slab_bytes)
    started_s = time.monotonic()
    await asyncio.gather(*(reader.read_into(handle, [ByteRange(0, slab_bytes)], place, 0) for _ in range(times)))
    return times * slab_bytes / MIB / (time.monotonic() - started_s)


async def _measure(owner: VerbsOwner, config: Config, slab_mib: int, rounds: int) -> Bandwidth:
    bus, device = open_bus(config, "reader", None), RdmaDevice()
    reader = VerbsReader(bus, device, TIMEOUT_S)
    try:
        place = reader.keep(np.zeros(slab_mib * MIB, np.uint8).data)
        await reader.read_into(owner.handle, [ByteRange(0, MIB)], place, 0)
        ours, theirs = [], []
        for _ in range(rounds):
            ours.append(await verbs_mib_per_s(reader, owner.handle, place, slab_mib * MIB))
            message_bytes = min(PIECE_BYTES, slab_mib * MIB)
            messages = max(slab_mib, MIN_MIB) * MIB // message_bytes
            raw = await asyncio.to_thread(perftest_mib_per_s, device.port.device, message_bytes, messages)
            theirs += [] if raw is None else [raw]
    finally:
        reader.close()
        device.close()
        await bus.close()
    raw = statistics.median(theirs) if theirs else None
    return Bandwidth(slab_mib=slab_mib, verbs=statistics.median(ours), ib_read_bw=raw)


def measure(slabs_mib: list[int], rounds: int = ROUNDS) -> list[Bandwidth]:
    """Measure each slab size. Call it before this process opens a device."""
    with tempfile.TemporaryDirectory(prefix="ls-") as folder:
        config = Config(cluster=ClusterConfig(run_dir=f"{folder}/run"))
        with VerbsOwner(pattern(max(slabs_mib) * MIB), config) as owner:
            return [asyncio.run(_measure(owner, config, slab_mib, rounds)) for slab_mib in slabs_mib]


if __name__ == "__main__":
    measured = measure([int(word) for word in sys.argv[1:]] or [1, 16, 64])
    lines = [{**msgspec.to_builtins(each), "ratio": each.ratio} for each in measured]
    print(msgspec.json.encode(lines).decode())
