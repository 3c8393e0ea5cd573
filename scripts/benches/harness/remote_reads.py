"""What it costs that an adapter lies on another engine: time to the first token, and steps of others while many come.

engine-0 holds all adapters; of the others each reads in one way alone: over shm, over tcp, or from the store.
"""

import itertools
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np

from harness.driver import Driver
from harness.engines import SERVICES, Engines
from harness.report import BenchError, say
from loraserve.cost import extent_bytes
from loraserve.cost.derived import ITEM_BYTES, rank_elements
from loraserve.messages import AdapterRef
from loraserve.model_shape import ModelShape
from loraserve.testing.tiny_model import write_peft_adapter

OWNER = "engine-0"
READERS = {"shm": "engine-1", "tcp": "engine-2", "store": "engine-3"}
STRENGTH = 0.05
PROMPT_TOKENS = 16
MIB = 1 << 20
READER_POOL_BYTES = 96 * MIB
"""Room for two adapters of rank 64, or twenty of rank 8: one that is asked for after all others is not there. In less
one that runs might lie where it leaves no room on either side for a large one."""
SLOW_CHUNK_BYTES = 16 << 10
STREAMS = 4
STREAM_TOKENS = 3000
STEADY_STEPS = 10
RESIDENT = "resident"


class Read(NamedTuple):
    """One adapter that was not there: ``took_s`` from the engine's decision to load until it was verified."""

    absent_ttft_s: float
    resident_ttft_s: float
    took_s: float


def write_adapters(folder: Path, shape: ModelShape, ranks: Sequence[int]) -> dict[str, Path]:
    """Random ones on all seven projections."""
    return {
        f"r{rank}-{number}": write_peft_adapter(
            folder / f"{number}", shape, rank, seed=number, strength=STRENGTH, dtype="bfloat16"
        )
        for number, rank in enumerate(ranks)
    }


def pool_for_ranks(shape: ModelShape, ranks: Sequence[int]) -> int:
    """Room for one adapter of each, whatever the order in which they come."""
    needed = sum(extent_bytes(rank * rank_elements(shape) * ITEM_BYTES) for rank in ranks)
    return -(-needed // (64 * MIB)) * 64 * MIB


def reader_settings() -> dict[str, list[str]]:
    """By name; the owner's pool has room for everything. Whoever is to read from a peer would read very slowly from the
    store, so that it does not choose that."""
    pool = f"engine.pool_bytes={READER_POOL_BYTES}"
    slowly = f"engine.load_chunk_bytes={SLOW_CHUNK_BYTES}"
    return {
        READERS["shm"]: ['transfer.transports=["shm"]', pool, slowly],
        READERS["tcp"]: ['transfer.transports=["tcp"]', pool, slowly],
        READERS["store"]: ["transfer.transports=[]", pool],
    }


class RemoteReads:
    """Asks the engines, which run and of which the owner holds ``adapters``."""

    def __init__(self, engines: Engines, driver: Driver, adapters: Sequence[AdapterRef], shape: ModelShape) -> None:
        self._engines = engines
        self._driver = driver
        self._adapters = adapters
        self._shape = shape
        self._prompts = itertools.count(1)
        self._rng = Random(0)

    async def first_tokens(self, rank: int, rounds: int) -> dict[str, list[Read]]:
        """By way: all ways in turn, for one adapter after another of this rank."""
        found: dict[str, list[Read]] = {way: [] for way in READERS}
        turn = self._shuffled([adapter for adapter in self._adapters if adapter.rank == rank])
        # The first reads connect and map.
        for number in range(-2, rounds):
            adapter = next(turn)
            say_round(rank, number, rounds)
            for way in READERS:
                read = await self._read(way, adapter)
                if read is not None and number >= 0:
                    found[way].append(read)
        missing = [way for way, reads in found.items() if not reads]
        if missing:
            raise BenchError(f"nothing of rank {rank} was read by way of {missing[0]}: see adapter_loaded in the logs")
        return found

    async def _read(self, way: str, adapter: AdapterRef) -> Read | None:
        """None where it was read in another way after all, as on a busy machine a slow read is hedged, or before."""
        engine = READERS[way]
        if way == "store":
            forget_cached(Path(self._engines.config.cluster.data_dir), adapter.version)
        before = sum(1 for _ in self._engines.events(engine, "adapter_loaded"))
        absent_s = await self._driver.first_token_s(engine, adapter, self._prompt())
        loads = list(self._engines.events(engine, "adapter_loaded"))[before:]
        loaded = next((each for each in loads if each["adapter"] == adapter.name), None)
        if loaded is None or (loaded["source"] if way == "store" else loaded["transport"]) != way:
            what = f"from {loaded['source']} over {loaded['transport']}" if loaded else "before it was asked for"
            say(f"{engine} read {adapter.name} {what}: does not count")
            return None
        resident_s = await self._driver.first_token_s(engine, adapter, self._prompt())
        return Read(absent_s, resident_s, loaded["took_s"])

    async def while_loading(self, rounds: int) -> "StepGaps":
        """Streams of a resident adapter on one engine, while all others come to it one after another, and as long with
        none; and again with new streams, or a quick machine would be through with them before the last. What comes
        second is slower, as more has been generated: that is one and the other by turns."""
        engine = READERS["shm"]
        resident = min(self._adapters, key=lambda adapter: adapter.slab_bytes)
        others = [adapter for adapter in self._adapters if adapter is not resident]
        times_s = self._driver.step_times_s[engine]
        on, off = [], []
        for number in range(rounds):
            say(f"steps while adapters come: block {number + 1} of {rounds}")
            streams = [await self._driver.ask(engine, resident, self._prompt(), STREAM_TOKENS) for _ in range(STREAMS)]
            try:
                await self._steps(engine, STEADY_STEPS)
                if number % 2:
                    off.append(await self._as_long(on[-1]))
                on.append(await self._while_they_come(engine, others))
                if not number % 2:
                    off.append(await self._as_long(on[-1]))
                if any(stream.over.is_set() for stream in streams):
                    raise BenchError(f"streams ended before their block did: {streams[0].error or 'too short'}")
            finally:
                for stream in streams:
                    self._driver.give_up(stream)
        return StepGaps(gaps_within(times_s, on), gaps_within(times_s, off), rounds * len(others))

    async def _while_they_come(self, engine: str, adapters: Sequence[AdapterRef]) -> tuple[float, float]:
        began_s = time.perf_counter()
        for adapter in adapters:
            await self._driver.hold(engine, [adapter])
            await self._driver.let_go(engine)
        return began_s, time.perf_counter()

    async def _as_long(self, block: tuple[float, float]) -> tuple[float, float]:
        began_s = time.perf_counter()
        await self._driver.pause(block[1] - block[0])
        return began_s, time.perf_counter()

    async def _steps(self, engine: str, count: int) -> None:
        until = len(self._driver.step_times_s[engine]) + count
        while len(self._driver.step_times_s[engine]) < until:
            await self._driver.pause(0.02)

    def _shuffled(self, adapters: list[AdapterRef]) -> Iterator[AdapterRef]:
        """All, again and again in another order: engines bring in by themselves what usually follows."""
        while True:
            self._rng.shuffle(adapters)
            yield from adapters

    def _prompt(self) -> tuple[int, ...]:
        """None begins as another does, so that nothing of it is cached."""
        number = next(self._prompts)
        vocab = self._shape.vocab - 200
        return tuple(100 + (7919 * number + 13 * place) % vocab for place in range(PROMPT_TOKENS))


class StepGaps(NamedTuple):
    """Seconds between the tokens of streams: while adapters come, and while none does."""

    on_s: list[float]
    off_s: list[float]
    loads: int

    @property
    def growth(self) -> float:
        """Of the median."""
        return statistics.median(self.on_s) / statistics.median(self.off_s) - 1


def gaps_within(times_s: Sequence[float], blocks: Sequence[tuple[float, float]]) -> list[float]:
    """Of steps that begin and end within the same block."""
    return [
        after - before
        for begins_s, ends_s in blocks
        for before, after in itertools.pairwise(time_s for time_s in times_s if begins_s <= time_s <= ends_s)
    ]


def p99(values: Sequence[float]) -> float:
    return float(np.percentile(values, 99))


def medians(reads: Mapping[str, Sequence[Read]]) -> dict[str, tuple[float, float]]:
    """TTFT and read by way; of ``resident`` there is no read."""
    found = {
        way: (statistics.median(r.absent_ttft_s for r in each), statistics.median(r.took_s for r in each))
        for way, each in reads.items()
    }
    return {RESIDENT: (statistics.median(r.resident_ttft_s for each in reads.values() for r in each), 0.0), **found}


def say_round(rank: int, number: int, rounds: int) -> None:
    if number >= 0 and number % 5 == 0:
        say(f"first tokens with adapters of rank {rank}: {number + 1} of {rounds}")


def ttft_ratio(reads: Sequence[Read]) -> float:
    """Of an adapter that was read to the same one once resident, in the median read: what slows the machine down for a
    while slows both."""
    return statistics.median(read.absent_ttft_s / read.resident_ttft_s for read in reads)


def forget_cached(data_dir: Path, version: str) -> None:
    """The slab's file is read from the disk next. Raises BenchError where there is none."""
    file = next(slab_files(data_dir, version), None)
    if file is None:
        raise BenchError(f"the store has no slab {version[:12]}")
    descriptor = os.open(file, os.O_RDONLY)
    try:
        # What is not on the disk yet would stay.
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def slab_files(data_dir: Path, version: str) -> Iterator[Path]:
    return data_dir.glob(f"store/*/slabs/{version[:2]}/{version}.slab")


async def start_all(engines: Engines, driver: Driver, folders: Mapping[str, Path]) -> list[AdapterRef]:
    """Adapters registered and held by the owner."""
    engines.start(*SERVICES, OWNER, *READERS.values())
    await driver.ready(*SERVICES)
    say(f"registering {len(folders)} adapters")
    adapters = [await driver.register(name, path) for name, path in folders.items()]
    await driver.ready(OWNER, *READERS.values())
    say(f"{OWNER} gets all of them")
    await driver.hold(OWNER, adapters)
    await driver.fresh_load(OWNER)
    return adapters
