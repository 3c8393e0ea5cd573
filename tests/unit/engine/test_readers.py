"""What an engine reads over where a part of it does not work here."""

import pytest

from loraserve.engine import readers as engine_readers
from loraserve.engine.pool_memory import HostPool
from loraserve.engine.readers import Readers
from loraserve.errors import ConfigError
from loraserve.testing.bus import MemoryNetwork


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
