"""Reads of a slab over the in-memory bus: when layers are verified, and the state after a failure."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.adapter.dtypes import storage_dtype
from loraserve.adapter.format import make_layout
from loraserve.adapter.pack import Slab, seal_slab
from loraserve.clock import SystemClock
from loraserve.config import Config, EngineConfig
from loraserve.engine.compute.protocol import DeviceLostError
from loraserve.engine.loading import sources as loading_sources
from loraserve.engine.loading.sources import PeerTransports, SlabReadError, SourceFinder
from loraserve.engine.loading.speeds import LinkSpeeds
from loraserve.messages import ToEngine, ToStore
from loraserve.model_shape import MODULES, SLICES, ModelShape
from loraserve.testing.engine.load_scene import make_loader
from loraserve.testing.engine.offline import adapter_reference
from loraserve.testing.engine.watched_pool import WatchedPool
from loraserve.testing.memory_bus import MemoryNetwork

SHAPE = ModelShape(layers=5, hidden=16, heads=2, kv_heads=1, head_dim=8, ffn=24, vocab=64)
OFFSET = 4096
TIMEOUT_S = 20.0


def make_slab(ranks: tuple[int, ...] = (2, 1, 3, 1, 2)) -> Slab:
    """Return a slab whose layers have these ranks in all projections."""
    rows = [(rank,) * len(SLICES[module]) for rank in ranks for module in MODULES]
    layout = make_layout(SHAPE, "float32", rows, [(1.0,) * len(row) for row in rows])
    return seal_slab(layout, np.arange(1, layout.elements + 1).astype(storage_dtype("float32")))


class Scene:
    """One loader and the store that it reads from."""

    def __init__(self, slab: Slab, store: Any, pool: WatchedPool, chunk_bytes: int, threads: int) -> None:
        self.slab, self.store, self.pool = slab, store, pool
        network = MemoryNetwork()
        self._bus = network.bus("store", ToStore)
        bus, clock = network.bus("engine-0", ToEngine), SystemClock()
        engine = EngineConfig(load_chunk_bytes=chunk_bytes, load_timeout_s=TIMEOUT_S, digest_threads=threads)
        sources = SourceFinder(bus, Config(engine=engine), clock, LinkSpeeds(), PeerTransports(bus, pool, None))
        self._loader = make_loader(pool, sources, engine)

    async def __aenter__(self) -> "Scene":
        self._serving = asyncio.create_task(self.store.serve(self._bus))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._serving.cancel()
        await asyncio.wait([self._serving])
        self._loader.close()

    def load(self, offset_bytes: int = OFFSET) -> asyncio.Task[Any]:
        return asyncio.create_task(self._loader.read_slab(adapter_reference("a", self.slab), offset_bytes))

    def holds_the_slab(self) -> bool:
        return self.pool.memory[OFFSET : OFFSET + self.slab.header.slab_bytes] == self.slab.data


def held_at(slab: Slab, layer: int) -> tuple[WatchedPool, threading.Event]:
    """Return a pool where verifying this layer waits for the event."""
    pool, let_go = WatchedPool(OFFSET), threading.Event()

    def hold(at: int) -> None:
        if at == slab.header.layer(layer).start:
            assert let_go.wait(TIMEOUT_S)

    pool.before_digest = hold
    return pool, let_go


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


def flip(slab: Slab, at: int) -> Slab:
    data = bytearray(slab.data)
    data[at] ^= 1
    return Slab(slab.header, memoryview(data), slab.version)


@pytest.fixture
def play(scripted_store: Callable[..., Any]) -> Callable[..., None]:
    """Run a scenario; ``sent`` is what the store holds under the version of ``slab``."""

    def run(
        scenario: Callable[[Scene], Awaitable[None]],
        slab: Slab | None = None,
        sent: Slab | None = None,
        pool: WatchedPool | None = None,
        threads: int = 2,
    ) -> None:
        async def main() -> None:
            held = slab or make_slab()
            store = scripted_store({"a": sent or held})
            async with Scene(held, store, pool or WatchedPool(OFFSET), 1000, threads) as scene:
                await scenario(scene)
            assert scene.pool.busy == 0

        asyncio.run(main())

    return run


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.tuples(*[st.integers(0, 3)] * SHAPE.layers).filter(any),
    chunk_bytes=st.integers(300, 40_000),
    threads=st.integers(1, 4),
    on_device=st.booleans(),
    damaged=st.none() | st.floats(0, 1, exclude_max=True),
)
def test_a_slab_is_read_whole_or_its_damaged_layer_is_named(
    scripted_store: Any, ranks: tuple[int, ...], chunk_bytes: int, threads: int, on_device: bool, damaged: float | None
) -> None:
    slab = make_slab(ranks)
    at = None if damaged is None else int(damaged * slab.header.slab_bytes)

    async def main() -> None:
        store = scripted_store({"a": slab if at is None else flip(slab, at)})
        async with Scene(slab, store, WatchedPool(OFFSET, on_device), chunk_bytes, threads) as scene:
            if at is None:
                assert (await scene.load()).header == slab.header
                assert scene.holds_the_slab()
                assert not any(scene.pool.memory[:OFFSET])
                assert not any(scene.pool.memory[OFFSET + slab.header.slab_bytes :])
                return
            (layer,) = [n for n in range(SHAPE.layers) if at in slab.header.layer(n)]
            with pytest.raises(SlabReadError, match=f"layer {layer} does not match its digest; register") as failed:
                await scene.load()
            assert failed.value.code == "corrupt"

    asyncio.run(main())


@pytest.mark.parametrize("layer", [0, 2, SHAPE.layers - 1], ids=["first", "middle", "last"])
@pytest.mark.parametrize("where", ["first", "last"])
def test_a_damaged_layer_ends_the_read_before_the_rest_arrives(
    play: Callable[..., None], layer: int, where: str
) -> None:
    slab = make_slab()
    part = slab.header.layer(layer)

    async def scenario(scene: Scene) -> None:
        scene.store.holds = lambda message: message.offset_bytes >= part.stop
        with pytest.raises(SlabReadError, match=f"layer {layer} does not match"):
            await scene.load()

    play(scenario, slab, sent=flip(slab, part.start if where == "first" else part.stop - 1))


def test_a_layer_is_verified_while_later_layers_are_arriving(play: Callable[..., None]) -> None:
    verified = threading.Event()

    async def scenario(scene: Scene) -> None:
        first = scene.slab.header.layer(0)
        scene.pool.before_digest = lambda at: verified.set() if at == first.start else None
        scene.store.holds = lambda message: message.offset_bytes >= first.stop and not verified.is_set()
        await scene.load()
        assert scene.holds_the_slab()

    play(scenario)


def test_a_lost_answer_of_the_store_delays_a_load_only_for_a_moment(
    play: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading_sources, "SILENCE_S", 0.1)
    lost: list[Any] = []

    async def scenario(scene: Scene) -> None:
        def is_lost(message: Any) -> bool:
            lost.append(message)
            return message is lost[0]

        scene.store.holds = is_lost
        async with asyncio.timeout(TIMEOUT_S / 2):
            await scene.load()
        assert scene.holds_the_slab()

    play(scenario)


def test_in_host_memory_nothing_is_verified_beside_the_copy(play: Callable[..., None]) -> None:
    pool = WatchedPool(OFFSET, on_device=False)

    async def scenario(scene: Scene) -> None:
        last = scene.slab.header.slab_bytes - 1
        pool.before_digest = lambda at: found.append(pool.memory[OFFSET + last])
        found: list[int] = []
        await scene.load()
        assert found == [scene.slab.data[last]] * SHAPE.layers
        assert pool.most_reading <= 2

    play(scenario, pool=pool)


def test_a_header_of_another_version_is_refused_before_any_chunk_is_read(play: Callable[..., None]) -> None:
    slab = make_slab()
    other = flip(slab, 0)
    swapped = Slab(
        seal_slab(slab.header, np.frombuffer(other.data, storage_dtype("float32"))).header, other.data, slab.version
    )

    async def scenario(scene: Scene) -> None:
        with pytest.raises(SlabReadError, match="the slab's header is of another version; register") as failed:
            await scene.load()
        assert (failed.value.code, scene.store.chunks_asked) == ("corrupt", 0)

    play(scenario, slab, sent=swapped)


@pytest.mark.parametrize("at", ["digest", "write"])
def test_a_cancelled_read_waits_for_the_threads_that_use_the_extent(play: Callable[..., None], at: str) -> None:
    """The extent may be given to another adapter right afterwards."""
    let_go = threading.Event()
    pool = WatchedPool(OFFSET)

    def hold(_: int) -> None:
        assert let_go.wait(TIMEOUT_S)

    async def scenario(scene: Scene) -> None:
        setattr(pool, f"before_{at}", hold)
        loading = scene.load()
        await until(lambda: pool.busy if at == "write" else len(pool.read) == 2)
        loading.cancel()
        await asyncio.sleep(0.1)
        assert not loading.done(), "threads are at it"
        let_go.set()
        with pytest.raises(asyncio.CancelledError):
            await loading
        memory = bytes(pool.memory)
        await asyncio.sleep(0.05)
        assert bytes(pool.memory) == memory, "nobody came back"
        assert len(pool.read) == (2 if at == "digest" else 0), "layers that waited for a thread were given up"

    play(scenario, pool=pool)


def test_a_damaged_layer_is_reported_after_the_other_threads_are_done(play: Callable[..., None]) -> None:
    slab = make_slab()
    pool, let_go = held_at(slab, 1)

    async def scenario(scene: Scene) -> None:
        loading = scene.load()
        await until(lambda: len(pool.read) > 2)
        await asyncio.sleep(0.05)
        assert not loading.done()
        let_go.set()
        with pytest.raises(SlabReadError, match="layer 2 does not match"):
            await loading

    play(scenario, slab, sent=flip(slab, slab.header.layer(2).start), pool=pool)


def test_a_read_that_fails_while_it_is_cancelled_is_cancelled(play: Callable[..., None]) -> None:
    """Otherwise a deadline that passes at that moment would not end the read, and another source would be tried."""
    slab = make_slab()
    pool, let_go = held_at(slab, 1)

    async def scenario(scene: Scene) -> None:
        loading = scene.load()
        await until(lambda: len(pool.read) > 2)
        await asyncio.sleep(0.05)
        loading.cancel()
        await asyncio.sleep(0.01)
        let_go.set()
        with pytest.raises(asyncio.CancelledError):
            await loading

    play(scenario, slab, sent=flip(slab, slab.header.layer(2).start), pool=pool)


def test_a_device_lost_during_verification_is_raised(play: Callable[..., None]) -> None:
    def lost(_: int) -> None:
        raise DeviceLostError("CUDA error: an illegal memory access was encountered")

    async def scenario(scene: Scene) -> None:
        scene.pool.before_digest = lost
        with pytest.raises(DeviceLostError, match="illegal memory access"):
            await scene.load()

    play(scenario)


def test_loads_share_the_threads_and_the_time(play: Callable[..., None]) -> None:
    pool = WatchedPool(OFFSET)
    together = threading.Barrier(3)

    async def scenario(scene: Scene) -> None:
        # The barrier breaks unless three threads reach it at the same time, as many as are configured.
        pool.before_digest = lambda at: together.wait(TIMEOUT_S)
        size = scene.slab.header.slab_bytes
        began_s = asyncio.get_running_loop().time()
        loaded = await asyncio.gather(*(scene.load(OFFSET + n * size) for n in range(3)))
        assert 0 < sum(each.own_s for each in loaded) <= asyncio.get_running_loop().time() - began_s + 1e-6
        assert len(pool.read) == 3 * SHAPE.layers
        assert pool.most_reading == 3

    play(scenario, pool=pool, threads=3)
