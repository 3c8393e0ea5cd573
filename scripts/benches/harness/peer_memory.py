"""Looks at the shared memory of other processes from outside, and writes into it what should not be there."""

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
    """Flips bytes of an adapter in an engine's pool, under a lease, so that they are that adapter's for certain."""

    def __init__(self, bus: ZmqBus, pool_bytes: int) -> None:
        self._bus = bus
        self._pool_bytes = pool_bytes
        self._reads = 0

    async def poison(self, engine: str, pid: int, adapter: AdapterRef, places: Iterable[float]) -> bool | None:
        """At these places, shares of the slab from 0 to below 1. False: it could not be leased, and nothing was done.
        None: the lease was over before the bytes were written, so that another's may have been."""
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
        # Elsewhere, as in a cache, it would be of another memory than the pool.
        in_pool = any(handle.length_bytes == self._pool_bytes for handle in granted.handles)
        # It lasts from when it was asked for; a process that was kept waiting may come too late.
        in_time = time.monotonic() < asked_s + granted.lasts_s / 2
        done = in_pool and in_time and flip(pid, self._pool_bytes, offsets)
        certain = time.monotonic() < asked_s + granted.lasts_s
        release = ReleaseLease(lease_id=granted.lease_id, incarnation=self._bus.incarnation)
        with contextlib.suppress(PeerError, RequestTimeoutError):
            certain |= (await self._bus.request(engine, release, LeaseReleased, TIMEOUT_S)).held
        return done and (True if certain else None)


def flip(pid: int, length_bytes: int, offsets_bytes: Iterable[int]) -> bool:
    """Invert a few bytes at each offset of the shared memory of this length of another process of the same user.

    False where it has none, or does not live any more.
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
    """Under a name of its own: of the engines' leases with each other nothing changes."""
    bus = open_bus(config, "poisoner", None)
    try:
        yield Poisoner(bus, config.engine.pool_bytes)
    finally:
        await bus.close()


def held_by(pid: int) -> set[str]:
    """Names of the shared memories that a process has descriptors of; none where there is no such process."""
    found: set[str] = set()
    # It may end meanwhile, and descriptors come and go.
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.update(MEMFD.findall(os.readlink(link)))
    return found


def mapped_by(pid: int) -> set[str]:
    """And of those that it has mapped."""
    with contextlib.suppress(OSError):
        return set(MEMFD.findall(Path(f"/proc/{pid}/maps").read_text()))
    return set()


def left_of(names: set[str]) -> set[str]:
    """Which of these any process of the machine that we may look at still holds."""
    pids = [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()]
    return {name for pid in pids for name in held_by(pid) | mapped_by(pid)} & names


def named_segments() -> set[str]:
    """Ours in /dev/shm, where a kill would leave them behind."""
    folder = Path("/dev/shm")
    return {path.name for path in folder.iterdir() if path.name.startswith(NAME_PREFIX)} if folder.exists() else set()
