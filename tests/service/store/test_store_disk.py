"""A store process whose disk is full, slow or stuck. A preloaded library makes the disk faulty."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from loraserve.bus.protocol import Bus
from loraserve.bus.zmq import open_bus
from loraserve.config import Config, to_toml
from loraserve.errors import PeerError, RequestTimeoutError
from loraserve.messages import (
    AdapterList,
    AdapterRegistered,
    AdapterUnregistered,
    ListAdapters,
    OpenSlab,
    Ping,
    Pong,
    ReadSlab,
    RegisterAdapter,
    SlabChunk,
    SlabInfo,
    UnregisterAdapter,
)
from loraserve.testing.faults.shim import Shim, build_shim, has_compiler

pytestmark = pytest.mark.skipif(not has_compiler(), reason="needs Linux and a C compiler")

TIMEOUT_S = 20.0
Peft = Callable[..., Path]


class StoreProcess:
    """A store process with a faulty disk, and a client of it. ``disk`` controls the faults."""

    def __init__(self, folder: Path, config: Config, disk: Shim) -> None:
        self.disk = disk
        self._folder = folder
        self._config = config
        self._bus: Bus
        self.process: subprocess.Popen[bytes]
        (folder / "store.toml").write_text(to_toml(config))

    @asynccontextmanager
    async def running(self) -> AsyncIterator["StoreProcess"]:
        """Run the store within the block."""
        self._start()
        self._bus = open_bus(self._config, "client", Ping)
        try:
            await self._wait_ready()
            yield self
        finally:
            self.process.kill()
            self.process.wait()
            await self._bus.close()

    def _start(self) -> None:
        command = [sys.executable, "-m", "loraserve.store", "--config", str(self._folder / "store.toml")]
        environment = {**os.environ, **self.disk.environment()}
        with (self._folder / "store.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    async def _wait_ready(self) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                assert self.process.poll() is None, (self._folder / "store.log").read_text()
                with suppress(RequestTimeoutError, PeerError):
                    if (await self._bus.request("store", Ping(), Pong, 1.0)).state == "READY":
                        return

    async def ask(self, message: Any, kind: type[Any], timeout_s: float = TIMEOUT_S) -> Any:
        return await self._bus.request("store", message, kind, timeout_s)

    async def register(self, name: str, path: Path, timeout_s: float = TIMEOUT_S) -> AdapterRegistered:
        message = RegisterAdapter(name=name, path=str(path))
        answer: AdapterRegistered = await self.ask(message, AdapterRegistered, timeout_s)
        return answer

    async def unregister(self, name: str) -> None:
        await self.ask(UnregisterAdapter(name=name), AdapterUnregistered)

    async def names(self) -> set[str]:
        listed: AdapterList = await self.ask(ListAdapters(), AdapterList)
        return {adapter.name for adapter in listed.adapters}


@pytest.fixture
def store(tmp_path: Path, helpers: SimpleNamespace) -> Iterator[StoreProcess]:
    # Socket paths must be short.
    with tempfile.TemporaryDirectory(prefix="ls-") as folder:
        config = helpers.store_config(tmp_path)
        config = msgspec.structs.replace(config, cluster=msgspec.structs.replace(config.cluster, run_dir=folder))
        library = build_shim(tmp_path / "shim")
        yield StoreProcess(tmp_path, config, Shim(library, tmp_path / "faults", tmp_path / "data"))


def test_adapters_are_unregistered_on_a_full_disk(store: StoreProcess, peft: Peft) -> None:
    names = [f"adapter-{number}" for number in range(12)]

    async def fill_and_unregister() -> None:
        async with store.running():
            for name in names:
                await store.register(name, peft(0, rank=1))
            store.disk.limit_disk(0)
            for name in names[:4]:
                await store.unregister(name)
                # Other programs take whatever becomes free.
                store.disk.limit_disk(0)
            assert await store.names() == set(names[4:])
        async with store.running():
            assert await store.names() == set(names[4:]), "the removals are durable"
            for name in names[4:8]:
                await store.unregister(name)
                store.disk.limit_disk(0)
        async with store.running():
            assert await store.names() == set(names[8:])

    asyncio.run(fill_and_unregister())


def test_a_full_disk_refuses_registrations_with_the_remedy_and_loses_nothing(store: StoreProcess, peft: Peft) -> None:
    async def register_on_a_full_disk() -> None:
        async with store.running():
            await store.register("kept", peft(0))
            store.disk.limit_disk(0)
            for name, path in (("same content", peft(0)), ("other content", peft(1))):
                with pytest.raises(PeerError, match="free space under") as refused:
                    await store.register(name, path)
                assert refused.value.code == "disk_full"
            assert (await store.register("kept", peft(0))).created is False, "a repetition needs no space"
            await store.unregister("kept")
            with pytest.raises(PeerError, match="no space left"):
                # The space that a removal needs is not given to a registration.
                await store.register("again", peft(0))
            store.disk.limit_disk(None)
            await store.register("again", peft(0))
            assert await store.names() == {"again"}

    asyncio.run(register_on_a_full_disk())


def test_slabs_are_read_while_registrations_wait_for_the_disk(store: StoreProcess, peft: Peft) -> None:
    async def read_while_blocked() -> None:
        async with store.running():
            adapter = (await store.register("first", peft(0))).adapter
            store.disk.block_disk(True)
            waiting = [asyncio.create_task(store.register(f"other-{n}", peft(n + 1), 60.0)) for n in range(40)]
            # Each of the store's threads is now inside a write.
            await asyncio.sleep(1.0)
            started_s = time.monotonic()
            info = await store.ask(OpenSlab(version=adapter.version), SlabInfo, 3.0)
            read = ReadSlab(version=adapter.version, offset_bytes=0, length_bytes=info.slab_bytes)
            await store.ask(read, SlabChunk, 3.0)
            assert await store.names() == {"first"}
            assert time.monotonic() - started_s < 3.0
            store.disk.block_disk(False)
            await asyncio.gather(*waiting)
            assert len(await store.names()) == 41

    asyncio.run(read_while_blocked())


def test_sigterm_ends_a_store_whose_threads_wait_for_the_disk(store: StoreProcess, peft: Peft) -> None:
    async def stop_while_blocked() -> None:
        async with store.running():
            await store.register("first", peft(0))
            store.disk.block_disk(True)
            waiting = [
                # The slab of the first ones is stored, so that their threads wait inside the registry.
                *(asyncio.create_task(store.register(f"same-{n}", peft(0))) for n in range(3)),
                *(asyncio.create_task(store.register(f"other-{n}", peft(n + 1))) for n in range(40)),
            ]
            await asyncio.sleep(1.0)
            store.process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(store.process.wait, TIMEOUT_S) == 0
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            store.disk.block_disk(False)
        async with store.running():
            assert await store.names() == {"first"}

    asyncio.run(stop_while_blocked())
