"""Adapters that load while an engine serves: from a store that is slow, damaged, silent, dead, or the real one."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from loraserve.clock import SystemClock
from loraserve.config import ClusterConfig, Config, StoreConfig
from loraserve.engine.setup import build_runner
from loraserve.messages import Abort, ExpectAdapter, PrefetchCounts
from loraserve.service import ServiceState
from loraserve.store.service import StoreService

Play = Callable[..., None]


def test_other_requests_decode_while_an_adapter_loads(play: Play, models: Any) -> None:
    async def scenario(stage: Any) -> None:
        stage.store.open.clear()
        await stage.admit("base", tokens=300)
        await stage.admit("waits", "one")
        await stage.until(lambda: stage.store.chunks_asked > 0)
        seen = len(stage.tokens["base"])
        await stage.until(lambda: len(stage.tokens["base"]) > seen + 20)
        assert stage.tokens["waits"] == []
        load = await stage.fresh_load()
        assert (load.adapters.loading, load.adapters.resident) == ((models.refs["one"].version,), ())
        stage.store.open.set()
        await stage.finished("base", "waits")
        assert stage.tokens["waits"] == models.expected("one", 8)
        assert stage.tokens["base"] == models.expected("", 300)

    play(scenario)


def flip_a_bit(chunk: bytes) -> bytes:
    return bytes([chunk[0] ^ 1]) + chunk[1:]


@pytest.mark.parametrize(
    ("corrupt", "reason"),
    [(flip_a_bit, "layer 0 does not match its digest"), (lambda chunk: chunk[:-1], "the answer has another size")],
    ids=["flipped", "short"],
)
def test_a_damaged_slab_fails_its_own_requests_and_nothing_else(
    play: Play, models: Any, corrupt: Callable[[bytes], bytes], reason: str
) -> None:
    async def scenario(stage: Any) -> None:
        await stage.admit("base", tokens=100)
        stage.store.corrupt = corrupt
        await stage.admit("hurt", "one")
        await stage.finished("hurt")
        assert stage.failed["hurt"].code == "adapter_unavailable"
        assert stage.failed["hurt"].message.startswith("adapter one could not be loaded: corrupt: ")
        assert reason in stage.failed["hurt"].message
        stage.store.corrupt = lambda chunk: chunk
        await stage.admit("healed", "one")
        await stage.finished("base", "healed")
        assert stage.tokens["base"] == models.expected("", 100)
        assert stage.tokens["healed"] == models.expected("one", 8)
        assert stage.tokens["hurt"] == []

    play(scenario)


def test_a_store_that_never_answers_ends_the_load_in_time(play: Play, models: Any) -> None:
    async def scenario(stage: Any) -> None:
        stage.store.open.clear()
        await stage.admit("waits", "one")
        await stage.finished("waits")
        assert stage.failed["waits"].message == (
            "adapter one could not be loaded: timeout: neither a peer nor the store sent all of it within 0.3 s"
        )
        load = await stage.fresh_load()
        assert (load.adapters.loading, load.memory.pool_free_bytes) == ((), stage.capabilities.pool_bytes)

    play(scenario, load_timeout_s=0.3)


def test_a_missing_or_different_slab_in_the_store_is_reported(play: Play, models: Any) -> None:
    async def scenario(stage: Any) -> None:
        stage.store.slab_bytes_off = 1
        del stage.store.slabs[models.refs["two"].version]
        await stage.admit("other", "one")
        await stage.admit("lost", "two")
        await stage.finished("other", "lost")
        assert "mismatch: slab_bytes is" in stage.failed["other"].message
        assert "not_found: no such slab; register the adapter again" in stage.failed["lost"].message

    play(scenario)


def test_a_slab_of_another_dtype_is_a_failure_not_a_wrong_answer(play: Play, models: Any) -> None:
    async def scenario(stage: Any) -> None:
        await stage.admit("r", "one")
        await stage.finished("r")
        assert "slab is float32, engine.slab_dtype is bfloat16; register the adapter again" in stage.failed["r"].message

    play(scenario, slab_dtype="bfloat16")


def test_a_store_that_is_restarted_in_the_middle_of_a_load_is_asked_again(play: Play, models: Any) -> None:
    async def scenario(stage: Any) -> None:
        stage.store.open.clear()
        await stage.admit("waits", "one")
        await stage.until(lambda: stage.store.chunks_asked)
        stage.store_dies()
        await stage.admit("base")
        await stage.finished("base")
        assert stage.tokens["base"] == models.expected("", 8)
        await stage.store_starts()
        await stage.finished("waits")
        assert stage.tokens["waits"] == models.expected("one", 8)

    play(scenario, load_timeout_s=3600.0)


def test_a_store_that_stays_away_ends_the_load_in_time(play: Play, models: Any) -> None:
    async def scenario(stage: Any) -> None:
        stage.store_dies()
        await stage.admit("waits", "one")
        await stage.finished("waits")
        assert "timeout: neither a peer nor the store sent all of it within 0.5 s" in stage.failed["waits"].message

    play(scenario, load_timeout_s=0.5)


def test_a_load_without_waiting_requests_is_cancelled_and_frees_its_room(play: Play, models: Any) -> None:
    async def scenario(stage: Any) -> None:
        stage.store.open.clear()
        await stage.admit("gone", "one")
        await stage.until(lambda: stage.store.chunks_asked)
        await stage.fresh_load()
        await stage.until(lambda: stage.load.adapters.loading == (models.refs["one"].version,))
        stage.gateway.send("engine-0", Abort(request_id="gone"))
        await stage.until(lambda: not stage.load.adapters.loading)
        assert stage.load.memory.pool_free_bytes == stage.capabilities.pool_bytes
        stage.store.open.set()
        await stage.admit("next", "one")
        await stage.finished("next")
        assert (stage.tokens, stage.failed) == ({"gone": [], "next": models.expected("one", 8)}, {})

    play(scenario)


def test_an_expected_adapter_is_resident_before_its_request(play: Play, models: Any) -> None:
    async def scenario(stage: Any) -> None:
        adapter = models.refs["one"]
        await stage.fresh_load()
        stage.gateway.send("engine-0", ExpectAdapter(adapter=adapter))
        await stage.until(lambda: [held.version for held in stage.load.adapters.resident] == [adapter.version])
        brought = PrefetchCounts(kind="admission", loaded_bytes=adapter.slab_bytes)
        assert stage.counters.prefetched == (brought,)
        await stage.admit("r", "one")
        await stage.finished("r")
        assert stage.tokens["r"] == models.expected("one", 8)
        useful = msgspec.structs.replace(brought, useful_bytes=adapter.slab_bytes)
        await stage.until(lambda: stage.counters.prefetched == (useful,))

    play(scenario)


def test_a_request_that_comes_during_a_cancellation_is_served(play: Play, models: Any) -> None:
    pool = DevicesPool()

    async def scenario(stage: Any) -> None:
        await stage.admit("gone", "one")
        await stage.until(lambda: pool.writing)
        stage.gateway.send("engine-0", Abort(request_id="gone"))
        await stage.admit("next", "one")
        assert (await stage.fresh_load()).adapters.loading == (models.refs["one"].version,), "a thread is at its extent"
        pool.open.set()
        await stage.finished("next")
        assert (stage.tokens["next"], stage.failed) == (models.expected("one", 8), {})
        assert pool.written > models.refs["one"].slab_bytes, "the first load wrote a chunk in vain"

    play(scenario, build=pool.build)


class DevicesPool:
    """A pool that behaves like a device's pool. A write waits for ``open`` and records its thread."""

    on_device = True

    def __init__(self) -> None:
        self.open = threading.Event()
        self.writing: list[threading.Thread] = []
        self.written = 0

    def build(self, config: Config, progress: Callable[[str], None]) -> Any:
        runner: Any = build_runner(config, progress)
        self._pool = runner.pool
        runner.pool = self
        return runner

    def __len__(self) -> int:
        return len(self._pool)

    def write(self, offset_bytes: int, data: Any) -> None:
        self.writing.append(threading.current_thread())
        assert self.open.wait(20.0)
        self._pool.write(offset_bytes, data)
        self.written += len(data)

    def digest(self, *arguments: Any) -> None:
        self._pool.digest(*arguments)


def test_other_requests_decode_while_a_slab_is_written_to_a_device(play: Play, models: Any) -> None:
    pool = DevicesPool()

    async def scenario(stage: Any) -> None:
        await stage.admit("waits", "one")
        await stage.until(lambda: pool.writing)
        await stage.admit("base")
        await stage.finished("base")
        assert stage.tokens == {"waits": [], "base": models.expected("", 8)}
        pool.open.set()
        await stage.finished("waits")
        assert stage.tokens["waits"] == models.expected("one", 8)
        assert pool.written == models.refs["one"].slab_bytes
        assert threading.main_thread() not in pool.writing

    play(scenario, build=pool.build)


def test_after_a_failed_load_nothing_writes_to_its_extent(play: Play, models: Any) -> None:
    """The extent is given to the next adapter."""
    pool = DevicesPool()

    async def scenario(stage: Any) -> None:
        await stage.admit("waits", "one")
        await stage.until(lambda: pool.writing)
        await asyncio.sleep(0.3)
        assert not stage.failed, "its time is up, but a thread is at it"
        pool.open.set()
        await stage.finished("waits")
        assert "timeout: neither a peer nor the store sent all of it within 0.1 s" in stage.failed["waits"].message
        assert pool.written == models.config.engine.load_chunk_bytes

    play(scenario, build=pool.build, load_timeout_s=0.1)


def test_tokens_are_right_with_a_slab_of_the_real_store(play: Play, models: Any, tmp_path: Path) -> None:
    async def scenario(stage: Any) -> None:
        stage.store_dies()
        config = msgspec.structs.replace(
            models.config,
            cluster=ClusterConfig(data_dir=str(tmp_path)),
            store=StoreConfig(adapters={name: str(folder) for name, folder in models.folders.items()}),
        )
        store = StoreService(config, stage.network.bus("store", StoreService.inbox), SystemClock())
        serving = asyncio.create_task(store.run())
        await stage.until(lambda: store.state is ServiceState.READY)
        for name in ("one", "two"):
            await stage.admit(name, name)
        await stage.finished("one", "two")
        for name in ("one", "two"):
            assert stage.tokens[name] == models.expected(name, 8)
        store.stop()
        await serving

    play(scenario)
