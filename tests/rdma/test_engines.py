"""Two engines read adapters from each other over RDMA. Engines, store and monitor are separate processes.

The engines run no model: their tokens are checksums of the adapter's bytes in the pool. While an engine must read from
its peer, SIGSTOP stops the store, so that the bytes cannot come from the store.
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
"""Each test has two tries. If the monitor reports the adapter's holder too late, the engine reads from the store."""
RANKS = {**dict.fromkeys(WHOLE + DAMAGED, 15), **dict.fromkeys(CUT, 120)}
"""The slabs have slightly less than 2 MiB (rank 15) and 16 MiB (rank 120)."""
POOL_BYTES = 64 << 20
ENGINES = ("engine-0", "engine-1")
PROMPT = (11, 7, 5, 3)
TOKENS = 4
HANGS_S = 90.0
STORE_FAILS = 5
"""After this many consecutive failures, an engine avoids the store for 16 seconds."""
PATIENCE_S = 10.0
"""A read from a peer finishes within this time. If none has finished, the engine did not read from the peer."""
ASKED_THE_STORE = "the engine asked only the store"
SAMPLE_BYTES = 1 << 14
Say = Callable[[str], None]
T = TypeVar("T")


class Cluster:
    """Starts and kills the processes, and gives access to the engines' pools."""

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
        """Start the processes that are not running."""
        kinds: dict[str, type[Service]] = {"store": StoreService, "monitor": MonitorService}
        for name, kind in (kinds | dict.fromkeys(ENGINES, ByteEngine)).items():
            if name not in self._processes:
                self._processes[name] = ForkedService(kind, name, self.config)

    def kill(self, name: str) -> None:
        process = self._processes.pop(name, None)
        if process is not None:
            process.kill()

    def kill_when(self, name: str, condition: Callable[[], bool]) -> bool:
        """Kill the process as soon as ``condition`` holds. Return False if it does not hold within PATIENCE_S."""
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
        """Stop the store during the block."""
        pid = self._processes["store"].pid
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def pool(self, engine: str) -> NDArray[np.uint8]:
        return pool_of(self._processes[engine].pid)

    def play(self, scenario: Callable[[EngineClient], Awaitable[T]]) -> T:
        """Run the scenario with a client when all processes are ready. Print the logs if it fails."""
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

    async def fail_store_loads(self, client: EngineClient, engine: str) -> None:
        """Make loads from the store fail, so that the engine prefers peers for a while."""
        unknown = AdapterRef(name="unknown", version="0" * 64, rank=1, slab_bytes=1)
        for _ in range(STORE_FAILS):
            request = await client.admit(engine, unknown, PROMPT, TOKENS)
            await until(partial(client.is_finished, request))

    async def check_tokens(self, client: EngineClient, request_id: str, adapter: str) -> None:
        """Check that the request finished with the tokens that follow from the packed adapter."""
        assert await client.tokens(request_id) == generated(self.slabs[adapter].data, PROMPT, TOKENS)

    async def make_resident(self, client: EngineClient, engine: str, adapter: str) -> None:
        """Load the adapter on the engine, check its tokens, and wait until the monitor reports the adapter."""
        await self.check_tokens(client, await self.admit(client, engine, adapter), adapter)
        await client.wait_resident(engine, self.slabs[adapter])


def try_each(cluster: Cluster, names: Sequence[str], scenario: Callable[[str, EngineClient], Awaitable[str]]) -> None:
    """Run the scenario for each name until one succeeds. A scenario returns "" or an allowed reason to try again."""
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


def test_an_adapter_is_read_from_the_engine_that_holds_it(cluster: Cluster, say: Say) -> None:
    async def read(name: str, client: EngineClient) -> str:
        await cluster.make_resident(client, "engine-0", name)
        await cluster.fail_store_loads(client, "engine-1")
        before, slab_bytes = client.reads("engine-1", "engine-0"), cluster.slabs[name].header.slab_bytes
        with cluster.without_store():
            began_s = time.monotonic()
            request = await cluster.admit(client, "engine-1", name)
            found = await within(PATIENCE_S, lambda: client.is_finished(request))
            took_s = time.monotonic() - began_s
        await cluster.check_tokens(client, request, name)
        if not found:
            return ASKED_THE_STORE
        await until(lambda: client.reads("engine-1", "engine-0").reads == before.reads + 1)
        after = client.reads("engine-1", "engine-0")
        read_bytes = after.read_bytes - before.read_bytes
        assert (after.transport, read_bytes, after.failed) == ("verbs", slab_bytes, before.failed)
        say(f"engine-1 read {read_bytes} bytes of engine-0's by {after.transport}, finished within {took_s:.2f} s")
        return ""

    try_each(cluster, WHOLE, read)


def test_the_store_replaces_an_owner_that_is_killed_during_a_read(cluster: Cluster, say: Say) -> None:
    async def cut(name: str, client: EngineClient) -> str:
        await cluster.make_resident(client, "engine-0", name)
        await cluster.fail_store_loads(client, "engine-1")
        pool = cluster.pool("engine-1")[::SAMPLE_BYTES]
        empty, slab_bytes = pool.copy(), cluster.slabs[name].header.slab_bytes
        before, stored = client.reads("engine-1", "engine-0"), client.reads("engine-1", "store")
        with cluster.without_store():
            # The read takes a fifth of a second, so a separate thread watches for its start.
            begun = partial(cluster.kill_when, "engine-0", lambda: bool((pool != empty).any()))
            killing = asyncio.create_task(asyncio.to_thread(begun))
            request = await cluster.admit(client, "engine-1", name)
            if not await killing:
                return ASKED_THE_STORE
            killed_s = time.monotonic()
            failed = await within(PATIENCE_S, lambda: client.reads("engine-1", "engine-0").failed == before.failed + 1)
            noticed_s, read_bytes = time.monotonic() - killed_s, np.count_nonzero(pool != empty) * SAMPLE_BYTES
        await cluster.check_tokens(client, request, name)
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


def test_a_restarted_engine_reads_from_its_peer(cluster: Cluster, say: Say) -> None:
    async def read(name: str, client: EngineClient) -> str:
        before = client.reads("engine-0", "engine-1")
        await cluster.make_resident(client, "engine-1", name)
        await cluster.fail_store_loads(client, "engine-0")
        await cluster.make_resident(client, "engine-0", name)
        if not await within(PATIENCE_S, lambda: client.reads("engine-0", "engine-1").reads == before.reads + 1):
            return ASKED_THE_STORE
        say(f"the restarted engine-0 read {cluster.slabs[name].header.slab_bytes} bytes of engine-1's")
        assert [client.counters[name].leaks for name in ENGINES] == [0, 0]
        return ""

    cluster.kill("engine-0")
    try_each(cluster, WHOLE, read)


def test_a_wrong_byte_of_the_owner_is_detected_and_the_store_is_read(cluster: Cluster, say: Say) -> None:
    async def mismatched(name: str, client: EngineClient) -> str:
        await cluster.make_resident(client, "engine-0", name)
        slab, pool = np.frombuffer(cluster.slabs[name].data, np.uint8), cluster.pool("engine-0")
        extent = pool[pool.tobytes().index(slab[:4096].tobytes()) :][: len(slab)]
        assert (extent == slab).all()
        extent[len(slab) // 2] ^= 1
        await cluster.fail_store_loads(client, "engine-1")
        before, stored = client.reads("engine-1", "engine-0"), client.reads("engine-1", "store")
        with cluster.without_store():
            request = await cluster.admit(client, "engine-1", name)
            noticed = await within(
                PATIENCE_S, lambda: client.reads("engine-1", "engine-0").mismatched == before.mismatched + 1
            )
        await cluster.check_tokens(client, request, name)
        if not noticed:
            return ASKED_THE_STORE
        await until(lambda: client.reads("engine-1", "store").reads == stored.reads + 1)
        assert client.reads("engine-1", "store").read_bytes == stored.read_bytes + len(slab)
        assert [client.counters[name].leaks for name in ENGINES] == [0, 0]
        say(f"a wrong byte at engine-0: 1 mismatch counted, then {len(slab)} bytes of the store's were read")
        return ""

    try_each(cluster, DAMAGED, mismatched)
