"""What an engine reads over, in which pieces, and where a part of it does not work here."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from loraserve.engine import readers as engine_readers
from loraserve.engine.landing import Landing
from loraserve.engine.pool_memory import HostPool
from loraserve.engine.readers import Readers
from loraserve.errors import ConfigError
from loraserve.testing.bus import MemoryNetwork
from loraserve.transfer.protocol import PROTOCOL, Handle, Range, ShmHandle, TcpHandle

MIB = 1 << 20
COMMON: dict[str, Any] = {"protocol": PROTOCOL, "owner": "engine-1", "incarnation": "i", "length_bytes": 64 * MIB}
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


def test_an_engine_starts_whose_pool_the_rdma_device_cannot_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its host cache is offered over that device all the same."""
    monkeypatch.setattr(engine_readers, "VerbsReader", UnwillingVerbs)
    pool = HostPool(memoryview(bytearray(4096)))
    readers = Readers(MemoryNetwork().bus("engine-0", None), pool, object())  # type: ignore[arg-type]
    readers.close()
    assert UnwillingVerbs.closed


class NotingReader:
    def __init__(self) -> None:
        self.asked: list[Range] = []

    async def read(self, handle: Handle, ranges: Sequence[Range], into: memoryview) -> None:
        self.asked += ranges
        assert into.nbytes == sum(each.length_bytes for each in ranges)


@pytest.mark.parametrize(
    ("handle", "slab", "lengths"),
    [
        (SHM, 8, [8]),
        (SHM, 20, [8, 8, 4]),
        (SHM, 33, [33]),
        (TCP, 33, [8, 8, 8, 8, 1]),
    ],
)
def test_a_slab_is_read_by_pieces_but_where_a_thread_copies_it_at_once(
    handle: Handle, slab: int, lengths: list[int]
) -> None:
    pool = HostPool(np.empty(slab * MIB, np.uint8).data)
    readers = Readers(MemoryNetwork().bus("engine-0", None), pool, None)
    reader = NotingReader()
    readers._readers[handle.transport] = reader  # type: ignore[assignment]
    there: list[int] = []
    with ThreadPoolExecutor(1) as writers:
        landing = Landing(pool, 0, slab * MIB, there.append, writers)
        asyncio.run(readers.read(handle, MIB, landing))
    starts = [MIB + sum(lengths[:index]) * MIB for index in range(len(lengths))]
    assert reader.asked == [Range(start, length * MIB) for start, length in zip(starts, lengths, strict=True)]
    assert there == [sum(lengths[: index + 1]) * MIB for index in range(len(lengths))]
