"""Two engines, the store and the monitor, each a process of its own: adapters go from engine to engine by RDMA.

Only the model is none: an engine's tokens are checksums of the adapter's bytes in its pool. While an engine is to read
from its peer the store is stopped (SIGSTOP), so that nothing else can have brought what it has.
"""

import asyncio
import json
import os
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from numpy.typing import NDArray

from loraserve.adapter.pack import pack_peft
from loraserve.bus.zmq import open_bus
from loraserve.config import (
    ClusterConfig,
    Config,
    EngineConfig,
    ModelConfig,
    MonitorConfig,
    StoreConfig,
    TransferConfig,
)
from loraserve.messages import AdapterRef, ToGateway
from loraserve.model_shape import ModelShape
from loraserve.monitor.service import MonitorService
from loraserve.service import Service
from loraserve.store.service import StoreService
from loraserve.testing.engine.byte_engine import ByteEngine, generated, pool_of
from loraserve.testing.engine.client import EngineClient, reference, until, within
from loraserve.testing.forked import ForkedService
from loraserve.testing.peft_writer import named_tensors, random_pairs, write_peft

SHAPE = ModelShape(layers=4, hidden=512, heads=8, kv_heads=8, head_dim=64, ffn=1024, vocab=1000)
MODEL = {
    "model_type": "llama",
    "hidden_size": SHAPE.hidden,
    "intermediate_size": SHAPE.ffn,
    "num_hidden_layers": SHAPE.layers,
    "num_attention_heads": SHAPE.heads,
    "vocab_size": SHAPE.vocab,
}
WHOLE, DAMAGED, CUT = ("whole-1", "whole-2"), ("damaged-1", "damaged-2"), ("cut-1", "cut-2")
"""Two tries each: an engine does not wait long for the monitor to say who has an adapter, and reads from the store."""
RANKS = {**dict.fromkeys(WHOLE + DAMAGED, 15), **dict.fromkeys(CUT, 120)}
"""Just under 2 and 16 MiB."""
POOL_BYTES = 64 << 20
ENGINES = ("engine-0", "engine-1")
PROMPT = (11, 7, 5, 3)
TOKENS = 4
HANGS_S = 90.0
STORE_FAILS = 5
"""In a row: it is avoided for 16 seconds then."""
PATIENCE_S = 10.0
"""A read from a peer is over by then, or there is none."""
ASKED_THE_STORE = "engine-1 asked the store alone"
SAMPLE_BYTES = 1 << 14
Say = Callable[[str], None]
T = TypeVar("T")


class Cluster:
    """The processes from outside, and what lies in the pools of engines."""

    def __init__(self, root: Path) -> None:
        folders = {
            name: write_peft(root / name, named_tensors(random_pairs(SHAPE, rank, seed)), r=rank)
            for seed, (name, rank) in enumerate(RANKS.items())
        }
        (root / "model").mkdir()
        (root / "model" / "config.json").write_text(json.dumps(MODEL))
        self.slabs = {
            name: pack_peft(folder, SHAPE, "float32", max(RANKS.values())) for name, folder in folders.items()
        }
        self.config = Config(
            cluster=ClusterConfig(run_dir=str(root / "run"), data_dir=str(root / "data"), log_dir=str(root / "logs")),
            model=ModelConfig(path=str(root / "model")),
            engine=EngineConfig(
                device="cpu",
                slab_dtype="float32",
                kv_bytes=1 << 20,
                pool_bytes=POOL_BYTES,
                host_cache_bytes=0,
                load_interval_s=0.1,
                statistics_interval_s=0.1,
                digest_threads=1,
            ),
            monitor=MonitorConfig(publish_interval_s=0.1),
            store=StoreConfig(adapters={name: str(folder) for name, folder in folders.items()}),
            transfer=TransferConfig(transports=("verbs",)),
        )
        self._processes: dict[str, ForkedService] = {}
        self.start()

    def start(self) -> None:
        """Whatever does not run."""
        kinds: dict[str, type[Service]] = {"store": StoreService, "monitor": MonitorService}
        for name, kind in (kinds | dict.fromkeys(ENGINES, ByteEngine)).items():
            if name not in self._processes:
                self._processes[name] = ForkedService(kind, name, self.config)

    def kill(self, name: str) -> None:
        process = self._processes.pop(name, None)
        if process is not None:
            process.kill()

    def kill_when(self, name: str, condition: Callable[[], bool]) -> bool:
        """At once. False where it did not come to that in time."""
        deadline_s = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > deadline_s:
                return False
        self.kill(name)
        return True

    def close(self) -> None:
        for name in list(self._processes):
            self.kill(name)

    @contextmanager
    def without_store(self) -> Iterator[None]:
        """It answers nobody meanwhile."""
        pid = self._processes["store"].pid
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def pool(self, engine: str) -> NDArray[np.uint8]:
        return pool_of(self._processes[engine].pid)

    def play(self, scenario: Callable[[EngineClient], Awaitable[T]]) -> T:
        """With a client, once all runs and is ready."""
        self.start()

        async def main() -> T:
            bus = open_bus(self.config, "gateway-0", ToGateway)
            client = EngineClient(bus)
            listening = asyncio.create_task(client.listen())
            try:
                async with asyncio.timeout(HANGS_S):
                    await client.serving("store")
                    for name in ENGINES:
                        await client.ready(name)
                    return await scenario(client)
            finally:
                listening.cancel()
                await bus.close()

        try:
            return asyncio.run(main())
        except BaseException:
            for path in sorted(Path(self.config.cluster.log_dir).glob("*.log")):
                print(path.name, path.read_text()[-3000:], sep="\n")
            raise

    async def admit(self, client: EngineClient, engine: str, adapter: str) -> str:
        return await client.admit(engine, reference(self.slabs[adapter]), PROMPT, TOKENS)

    async def disappoint(self, client: EngineClient, engine: str) -> None:
        """By the store, so that it asks peers first for a while, whatever it expects of either."""
        unknown = AdapterRef(name="unknown", version="0" * 64, rank=1, slab_bytes=1)
        for _ in range(STORE_FAILS):
            request = await client.admit(engine, unknown, PROMPT, TOKENS)
            await until(partial(client.is_finished, request))

    async def right(self, client: EngineClient, request_id: str, adapter: str) -> None:
        """It finished with the tokens of the adapter as it was packed."""
        assert await client.tokens(request_id) == generated(self.slabs[adapter].data, PROMPT, TOKENS)

    async def held(self, client: EngineClient, engine: str, adapter: str) -> None:
        """Loaded there, answered rightly, and known to the monitor."""
        await self.right(client, await self.admit(client, engine, adapter), adapter)
        await client.wait_resident(engine, self.slabs[adapter])


def try_each(cluster: Cluster, names: Sequence[str], scenario: Callable[[str, EngineClient], Awaitable[str]]) -> None:
    """Until one is as it should be; what a scenario returns is why it was not, for a reason that may be."""
    reasons: list[str] = []
    for name in names:
        reasons.append(cluster.play(partial(scenario, name)))
        if not reasons[-1]:
            return
    pytest.fail("; ".join(reasons))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="ls-") as root:
        cluster = Cluster(Path(root))
        try:
            yield cluster
        finally:
            cluster.close()


def test_an_adapter_is_read_from_the_engine_that_has_it(cluster: Cluster, say: Say) -> None:
    async def read(name: str, client: EngineClient) -> str:
        await cluster.held(client, "engine-0", name)
        await cluster.disappoint(client, "engine-1")
        before, slab_bytes = client.reads("engine-1", "engine-0"), cluster.slabs[name].header.slab_bytes
        with cluster.without_store():
            began_s = time.monotonic()
            request = await cluster.admit(client, "engine-1", name)
            found = await within(PATIENCE_S, lambda: client.is_finished(request))
            took_s = time.monotonic() - began_s
        await cluster.right(client, request, name)
        if not found:
            return ASKED_THE_STORE
        await until(lambda: client.reads("engine-1", "engine-0").reads == before.reads + 1)
        after = client.reads("engine-1", "engine-0")
        read_bytes = after.read_bytes - before.read_bytes
        assert (after.transport, read_bytes, after.failed) == ("verbs", slab_bytes, before.failed)
        say(f"engine-1 read {read_bytes} bytes of engine-0's by {after.transport}, finished within {took_s:.2f} s")
        return ""

    try_each(cluster, WHOLE, read)


def test_an_owner_that_is_killed_in_the_middle_of_a_read_is_followed_by_the_store(cluster: Cluster, say: Say) -> None:
    async def cut(name: str, client: EngineClient) -> str:
        await cluster.held(client, "engine-0", name)
        await cluster.disappoint(client, "engine-1")
        pool = cluster.pool("engine-1")[::SAMPLE_BYTES]
        empty, slab_bytes = pool.copy(), cluster.slabs[name].header.slab_bytes
        before, stored = client.reads("engine-1", "engine-0"), client.reads("engine-1", "store")
        with cluster.without_store():
            # In a thread that does nothing else: the read is over in a fifth of a second.
            begun = partial(cluster.kill_when, "engine-0", lambda: bool((pool != empty).any()))
            killing = asyncio.create_task(asyncio.to_thread(begun))
            request = await cluster.admit(client, "engine-1", name)
            if not await killing:
                return ASKED_THE_STORE
            killed_s = time.monotonic()
            failed = await within(PATIENCE_S, lambda: client.reads("engine-1", "engine-0").failed == before.failed + 1)
            noticed_s, read_bytes = time.monotonic() - killed_s, np.count_nonzero(pool != empty) * SAMPLE_BYTES
        await cluster.right(client, request, name)
        if not failed or read_bytes > 0.95 * slab_bytes:
            return f"engine-0 was killed when {read_bytes} of {slab_bytes} bytes were read"
        over_s = time.monotonic() - killed_s
        await until(lambda: client.reads("engine-1", "store").reads == stored.reads + 1)
        assert client.reads("engine-1", "store").read_bytes == stored.read_bytes + slab_bytes
        assert client.reads("engine-1", "engine-0").mismatched == before.mismatched
        say(f"engine-0 killed when {read_bytes} of {slab_bytes} bytes were read: noticed {noticed_s:.2f} s later,")
        say(f"    and the request finished, with the store's bytes, {over_s:.2f} s later")
        return ""

    try_each(cluster, CUT, cut)


def test_an_engine_that_is_started_anew_reads_from_the_other(cluster: Cluster, say: Say) -> None:
    async def read(name: str, client: EngineClient) -> str:
        before = client.reads("engine-0", "engine-1")
        await cluster.held(client, "engine-1", name)
        await cluster.disappoint(client, "engine-0")
        await cluster.held(client, "engine-0", name)
        if not await within(PATIENCE_S, lambda: client.reads("engine-0", "engine-1").reads == before.reads + 1):
            return ASKED_THE_STORE
        say(f"engine-0, started anew, read {cluster.slabs[name].header.slab_bytes} bytes of engine-1's")
        assert [client.counters[name].leaks for name in ENGINES] == [0, 0]
        return ""

    cluster.kill("engine-0")
    try_each(cluster, WHOLE, read)


def test_a_byte_that_is_wrong_at_its_owner_is_noticed_and_the_store_read(cluster: Cluster, say: Say) -> None:
    async def mismatched(name: str, client: EngineClient) -> str:
        await cluster.held(client, "engine-0", name)
        slab, pool = np.frombuffer(cluster.slabs[name].data, np.uint8), cluster.pool("engine-0")
        extent = pool[pool.tobytes().index(slab[:4096].tobytes()) :][: len(slab)]
        assert (extent == slab).all()
        extent[len(slab) // 2] ^= 1
        await cluster.disappoint(client, "engine-1")
        before, stored = client.reads("engine-1", "engine-0"), client.reads("engine-1", "store")
        with cluster.without_store():
            request = await cluster.admit(client, "engine-1", name)
            noticed = await within(
                PATIENCE_S, lambda: client.reads("engine-1", "engine-0").mismatched == before.mismatched + 1
            )
        await cluster.right(client, request, name)
        if not noticed:
            return ASKED_THE_STORE
        await until(lambda: client.reads("engine-1", "store").reads == stored.reads + 1)
        assert client.reads("engine-1", "store").read_bytes == stored.read_bytes + len(slab)
        assert [client.counters[name].leaks for name in ENGINES] == [0, 0]
        say(f"a wrong byte at engine-0: 1 mismatch counted, then {len(slab)} bytes of the store's were read")
        return ""

    try_each(cluster, DAMAGED, mismatched)
