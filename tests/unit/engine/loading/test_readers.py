"""Over which transports and in which pieces an engine reads, and what happens if a transport does not work."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from loraserve.engine.loading import sources as engine_readers
from loraserve.engine.loading.memory import HostPool, TransferTarget
from loraserve.engine.loading.sources import PeerTransports
from loraserve.errors import ConfigError
from loraserve.messages.transfer import TRANSFER_PROTOCOL_VERSION, Handle, ShmHandle, TcpHandle
from loraserve.testing.memory_bus import MemoryNetwork
from loraserve.transfer.protocol import ByteRange, TransferError

MIB = 1 << 20
COMMON: dict[str, Any] = {
    "protocol": TRANSFER_PROTOCOL_VERSION,
    "owner": "engine-1",
    "incarnation": "i",
    "length_bytes": 64 * MIB,
}
SHM = ShmHandle(**COMMON, pid=1, descriptor=3, name="n")
TCP = TcpHandle(**COMMON, token="t")


class UnwillingVerbs:
    """A VerbsReader whose device registers none of the pool's memory; the real one needs a device."""

    closed = False

    def __init__(self, *_: object) -> None:
        pass

    def keep(self, memory: object) -> None:
        raise ConfigError("cannot be registered: its driver offers no dma-buf")

    def close(self) -> None:
        UnwillingVerbs.closed = True


def test_an_engine_starts_though_the_rdma_device_cannot_reach_its_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host cache can still be offered over that device."""
    monkeypatch.setattr(engine_readers, "VerbsReader", UnwillingVerbs)
    pool = HostPool(memoryview(bytearray(4096)))
    readers = PeerTransports(MemoryNetwork().bus("engine-0", None), pool, object())  # type: ignore[arg-type]
    readers.close()
    assert UnwillingVerbs.closed


class RecordingReader:
    def __init__(self) -> None:
        self.asked: list[ByteRange] = []

    async def read(self, handle: Handle, ranges: Sequence[ByteRange], into: memoryview) -> None:
        self.asked += ranges
        assert into.nbytes == sum(each.length_bytes for each in ranges)


def read(
    handle: Handle, start: int, slab_bytes: int, reader: RecordingReader | None = None
) -> tuple[RecordingReader, list[int]]:
    """Read a slab; return the reader and the progress that was reported."""
    reader, there = reader or RecordingReader(), list[int]()
    pool = HostPool(np.empty(slab_bytes, np.uint8).data)
    readers = PeerTransports(MemoryNetwork().bus("engine-0", None), pool, None)
    readers._readers[handle.transport] = reader  # type: ignore[assignment]
    with ThreadPoolExecutor(1) as writers:
        asyncio.run(readers.copy(handle, start, TransferTarget(pool, 0, slab_bytes, there.append, writers)))
    return reader, there


@pytest.mark.parametrize(
    ("handle", "slab", "lengths"),
    [
        (SHM, 8, [8]),
        (SHM, 20, [8, 8, 4]),
        (SHM, 33, [33]),
        (TCP, 33, [8, 8, 8, 8, 1]),
    ],
)
def test_a_slab_is_read_in_pieces_unless_a_thread_copies_it_at_once(
    handle: Handle, slab: int, lengths: list[int]
) -> None:
    reader, there = read(handle, MIB, slab * MIB)
    starts = [MIB + sum(lengths[:index]) * MIB for index in range(len(lengths))]
    assert reader.asked == [ByteRange(start, length * MIB) for start, length in zip(starts, lengths, strict=True)]
    assert there == [sum(lengths[: index + 1]) * MIB for index in range(len(lengths))]


@pytest.mark.parametrize("start", [-1, TCP.length_bytes - 20 * MIB + 1])
def test_a_slab_outside_its_region_is_not_read_at_all(start: int) -> None:
    reader = RecordingReader()
    with pytest.raises(TransferError, match="out_of_range"):
        read(TCP, start, 20 * MIB, reader)
    assert reader.asked == []
