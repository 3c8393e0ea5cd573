"""Measures what reading an adapter costs: time to first token, and step times of other requests during loads.

engine-0 holds all adapters. Each other engine reads from one source only: over shm, over tcp, or from the store.
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
"""Room for two adapters of rank 64 or twenty of rank 8, so that an adapter requested after all others is not resident.
In a smaller pool, fragmentation around a running adapter could leave no room for a large one."""
SLOW_CHUNK_BYTES = 16 << 10
STREAMS = 4
STREAM_TOKENS = 3000
STEADY_STEPS = 10
RESIDENT = "resident"


class Read(NamedTuple):
    """A read of an absent adapter. ``took_s``: time from the start of the load until the slab was verified."""

    absent_ttft_s: float
    resident_ttft_s: float
    took_s: float


def write_adapters(folder: Path, shape: ModelShape, ranks: Sequence[int]) -> dict[str, Path]:
    """Write random adapters on all seven projections."""
    return {
        f"r{rank}-{number}": write_peft_adapter(
            folder / f"{number}", shape, rank, seed=number, strength=STRENGTH, dtype="bfloat16"
        )
        for number, rank in enumerate(ranks)
    }


def pool_for_ranks(shape: ModelShape, ranks: Sequence[int]) -> int:
    """Return a pool size with room for one adapter of each rank, in any order of loading."""
    needed = sum(extent_bytes(rank * rank_elements(shape) * ITEM_BYTES) for rank in ranks)
    return -(-needed // (64 * MIB)) * 64 * MIB


def reader_settings() -> dict[str, list[str]]:
    """Return the settings of each reader by name.

    Readers of a peer read the store in tiny pieces, so that the store is never the faster source.
    """
    pool = f"engine.pool_bytes={READER_POOL_BYTES}"
    slowly = f"engine.load_chunk_bytes={SLOW_CHUNK_BYTES}"
    return {
        READERS["shm"]: ['transfer.transports=["shm"]', pool, slowly],
        READERS["tcp"]: ['transfer.transports=["tcp"]', pool, slowly],
        READERS["store"]: ["transfer.transports=[]", pool],
    }


class RemoteReads:
    """Sends requests to the running engines. The owner holds ``adapters``."""

    def __init__(self, engines: Engines, driver: Driver, adapters: Sequence[AdapterRef], shape: ModelShape) -> None:
        self._engines = engines
        self._driver = driver
        self._adapters = adapters
        self._shape = shape
        self._prompts = itertools.count(1)
        self._rng = Random(0)

    async def first_tokens(self, rank: int, rounds: int) -> dict[str, list[Read]]:
        """Read each adapter of this rank from each source in turn, and return the reads by source."""
        found: dict[str, list[Read]] = {way: [] for way in READERS}
        turn = self._shuffled([adapter for adapter in self._adapters if adapter.rank == rank])
        # The first reads also connect and map memory; they are not counted.
        for number in range(-2, rounds):
            adapter = next(turn)
            say_round(rank, number, rounds)
            for way in READERS:
                read = await self._read(way, adapter)
                if read is not None and number >= 0:
                    found[way].append(read)
        missing = [way for way, reads in found.items() if not reads]
        if missing:
            raise BenchError(f"no adapter of rank {rank} was read from {missing[0]}; see adapter_loaded in the logs")
        return found

    async def _read(self, way: str, adapter: AdapterRef) -> Read | None:
        """Return the read, or None if it used another source (a slow read is hedged) or happened before the request."""
        engine = READERS[way]
        if way == "store":
            forget_cached(Path(self._engines.config.cluster.data_dir), adapter.version)
        before = sum(1 for _ in self._engines.events(engine, "adapter_loaded"))
        absent_s = await self._driver.first_token_s(engine, adapter, self._prompt())
        loads = list(self._engines.events(engine, "adapter_loaded"))[before:]
        loaded = next((each for each in loads if each["adapter"] == adapter.name), None)
        if loaded is None or (loaded["source"] if way == "store" else loaded["transport"]) != way:
            what = f"from {loaded['source']} over {loaded['transport']}" if loaded else "before it was requested"
            say(f"{engine} read {adapter.name} {what}; not counted")
            return None
        resident_s = await self._driver.first_token_s(engine, adapter, self._prompt())
        return Read(absent_s, resident_s, loaded["took_s"])

    async def while_loading(self, rounds: int) -> "StepGaps":
        """Measure step times of streams of a resident adapter, with and without loads of all other adapters.

        Each round uses new streams, so that they do not end before the last load. Steps become slower as a stream
        grows, so the order of the two blocks alternates between rounds.
        """
        engine = READERS["shm"]
        resident = min(self._adapters, key=lambda adapter: adapter.slab_bytes)
        others = [adapter for adapter in self._adapters if adapter is not resident]
        times_s = self._driver.step_times_s[engine]
        on, off = [], []
        for number in range(rounds):
            say(f"step times during loads: block {number + 1} of {rounds}")
            streams = [await self._driver.ask(engine, resident, self._prompt(), STREAM_TOKENS) for _ in range(STREAMS)]
            try:
                await self._steps(engine, STEADY_STEPS)
                if number % 2:
                    off.append(await self._wait_as_long(on[-1]))
                on.append(await self._load_all(engine, others))
                if not number % 2:
                    off.append(await self._wait_as_long(on[-1]))
                if any(stream.over.is_set() for stream in streams):
                    raise BenchError(f"streams ended before their block: {streams[0].error or 'too short'}")
            finally:
                for stream in streams:
                    self._driver.abort(stream)
        return StepGaps(gaps_within(times_s, on), gaps_within(times_s, off), rounds * len(others))

    async def _load_all(self, engine: str, adapters: Sequence[AdapterRef]) -> tuple[float, float]:
        began_s = time.perf_counter()
        for adapter in adapters:
            await self._driver.hold(engine, [adapter])
            await self._driver.unpin(engine)
        return began_s, time.perf_counter()

    async def _wait_as_long(self, block: tuple[float, float]) -> tuple[float, float]:
        began_s = time.perf_counter()
        await self._driver.pause(block[1] - block[0])
        return began_s, time.perf_counter()

    async def _steps(self, engine: str, count: int) -> None:
        until = len(self._driver.step_times_s[engine]) + count
        while len(self._driver.step_times_s[engine]) < until:
            await self._driver.pause(0.02)

    def _shuffled(self, adapters: list[AdapterRef]) -> Iterator[AdapterRef]:
        """Yield all adapters endlessly in random order, because engines prefetch adapters that usually follow."""
        while True:
            self._rng.shuffle(adapters)
            yield from adapters

    def _prompt(self) -> tuple[int, ...]:
        """Return a prompt that shares no prefix with another, so that nothing is cached."""
        number = next(self._prompts)
        vocab = self._shape.vocab - 200
        return tuple(100 + (7919 * number + 13 * place) % vocab for place in range(PROMPT_TOKENS))


class StepGaps(NamedTuple):
    """Seconds between tokens of the streams: ``on_s`` during loads, ``off_s`` without."""

    on_s: list[float]
    off_s: list[float]
    loads: int

    @property
    def growth(self) -> float:
        """Return the relative growth of the median step time during loads."""
        return statistics.median(self.on_s) / statistics.median(self.off_s) - 1


def gaps_within(times_s: Sequence[float], blocks: Sequence[tuple[float, float]]) -> list[float]:
    """Return the durations of steps that begin and end within one block."""
    return [
        after - before
        for begins_s, ends_s in blocks
        for before, after in itertools.pairwise(time_s for time_s in times_s if begins_s <= time_s <= ends_s)
    ]


def p99(values: Sequence[float]) -> float:
    return float(np.percentile(values, 99))


def medians(reads: Mapping[str, Sequence[Read]]) -> dict[str, tuple[float, float]]:
    """Return median TTFT and read time by source. The read time of ``resident`` is 0."""
    found = {
        way: (statistics.median(r.absent_ttft_s for r in each), statistics.median(r.took_s for r in each))
        for way, each in reads.items()
    }
    return {RESIDENT: (statistics.median(r.resident_ttft_s for each in reads.values() for r in each), 0.0), **found}


def say_round(rank: int, number: int, rounds: int) -> None:
    if number >= 0 and number % 5 == 0:
        say(f"time to first token, adapters of rank {rank}: {number + 1} of {rounds}")


def ttft_ratio(reads: Sequence[Read]) -> float:
    """Return the median ratio of TTFT with the read to TTFT of the same adapter once resident.

    Both are measured right after each other, so that a slow phase of the machine affects both.
    """
    return statistics.median(read.absent_ttft_s / read.resident_ttft_s for read in reads)


def forget_cached(data_dir: Path, version: str) -> None:
    """Drop the slab's file from the page cache. Raises BenchError if there is no such file."""
    file = next(slab_files(data_dir, version), None)
    if file is None:
        raise BenchError(f"the store has no slab {version[:12]}")
    descriptor = os.open(file, os.O_RDONLY)
    try:
        # Dirty pages would stay in the cache.
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def slab_files(data_dir: Path, version: str) -> Iterator[Path]:
    return data_dir.glob(f"store/*/slabs/{version[:2]}/{version}.slab")


async def start_all(engines: Engines, driver: Driver, folders: Mapping[str, Path]) -> list[AdapterRef]:
    """Start all processes, register the adapters and load them on the owner."""
    engines.start(*SERVICES, OWNER, *READERS.values())
    await driver.ready(*SERVICES)
    say(f"registering {len(folders)} adapters")
    adapters = [await driver.register(name, path) for name, path in folders.items()]
    await driver.ready(OWNER, *READERS.values())
    say(f"loading all adapters on {OWNER}")
    await driver.hold(OWNER, adapters)
    await driver.fresh_load(OWNER)
    return adapters
