"""Inspects the shared memory of other processes, and corrupts it."""

import contextlib
import os
import re
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

from loraserve.bus.zmq import ZmqBus, open_bus
from loraserve.config import Config
from loraserve.errors import PeerError, RequestTimeoutError
from loraserve.messages import AdapterRef, LeaseGranted, LeaseReleased, LeaseSlab, ReleaseLease
from loraserve.messages.transfer import TRANSFER_PROTOCOL_VERSION
from loraserve.transfer.same_host import NAME_PREFIX

TIMEOUT_S = 2.0
DAMAGED_BYTES = 64
MEMFD = re.compile(rf"/memfd:({NAME_PREFIX}[0-9a-f]+)")


class Poisoner:
    """Inverts bytes of an adapter in an engine's pool. A lease prevents that another adapter takes its place."""

    def __init__(self, bus: ZmqBus, pool_bytes: int) -> None:
        self._bus = bus
        self._pool_bytes = pool_bytes
        self._reads = 0

    async def poison(self, engine: str, pid: int, adapter: AdapterRef, places: Iterable[float]) -> bool | None:
        """Corrupt the slab at these places, given as fractions of it from 0 to below 1.

        Returns:
            True if done, False if no lease was granted and nothing was changed, None if the lease may have ended
            before the bytes were written, so that another adapter may have been hit.
        """
        self._reads += 1
        message = LeaseSlab(
            protocol=TRANSFER_PROTOCOL_VERSION,
            incarnation=self._bus.incarnation,
            read_id=f"poison-{self._reads}",
            version=adapter.version,
            slab_bytes=adapter.slab_bytes,
        )
        asked_s = time.monotonic()
        try:
            granted = await self._bus.request(engine, message, LeaseGranted, TIMEOUT_S)
        except (PeerError, RequestTimeoutError):
            return False
        offsets = [granted.offset_bytes + int(place * (adapter.slab_bytes - DAMAGED_BYTES)) for place in places]
        # The copy may be in the host cache instead of the pool.
        in_pool = any(handle.length_bytes == self._pool_bytes for handle in granted.handles)
        # The lease counts from the request; this process may have been delayed.
        in_time = time.monotonic() < asked_s + granted.lasts_s / 2
        done = in_pool and in_time and flip(pid, self._pool_bytes, offsets)
        certain = time.monotonic() < asked_s + granted.lasts_s
        release = ReleaseLease(lease_id=granted.lease_id, incarnation=self._bus.incarnation)
        with contextlib.suppress(PeerError, RequestTimeoutError):
            certain |= (await self._bus.request(engine, release, LeaseReleased, TIMEOUT_S)).held
        return done and (True if certain else None)


def flip(pid: int, length_bytes: int, offsets_bytes: Iterable[int]) -> bool:
    """Invert a few bytes at each offset of a process's shared memory of this length.

    Returns False if the process has none or has ended.
    """
    try:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            if MEMFD.search(os.readlink(link)) and link.stat().st_size == length_bytes:
                with link.open("r+b", buffering=0) as memory:
                    for offset in offsets_bytes:
                        there = os.pread(memory.fileno(), DAMAGED_BYTES, offset)
                        os.pwrite(memory.fileno(), bytes(byte ^ 0xFF for byte in there), offset)
                return True
    except OSError:
        return False
    return False


@asynccontextmanager
async def poisoning(config: Config) -> AsyncIterator[Poisoner]:
    """Connect a Poisoner under a bus name of its own, so that the engines' leases are not affected."""
    bus = open_bus(config, "poisoner", None)
    try:
        yield Poisoner(bus, config.engine.pool_bytes)
    finally:
        await bus.close()


def held_by(pid: int) -> set[str]:
    """Return the names of shared memory that a process has open. Empty if the process does not exist."""
    found: set[str] = set()
    # The process may end, and descriptors may be closed, while they are read.
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.update(MEMFD.findall(os.readlink(link)))
    return found


def mapped_by(pid: int) -> set[str]:
    """Return the names of shared memory that a process has mapped."""
    with contextlib.suppress(OSError):
        return set(MEMFD.findall(Path(f"/proc/{pid}/maps").read_text()))
    return set()


def left_of(names: set[str]) -> set[str]:
    """Return those of these names that any readable process of the machine still holds."""
    pids = [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()]
    return {name for pid in pids for name in held_by(pid) | mapped_by(pid)} & names


def named_segments() -> set[str]:
    """Return our segments in /dev/shm, which a killed process leaves behind."""
    folder = Path("/dev/shm")
    return {path.name for path in folder.iterdir() if path.name.startswith(NAME_PREFIX)} if folder.exists() else set()
