"""Fills an extent of the pool with an adapter's slab while steps run, from wherever it is there soonest.

What fails or mismatches leaves it to the next source, and beside one that takes much longer than expected another is
tried.
"""

import asyncio
from collections import deque
from collections.abc import Sequence

import numpy as np

from loraserve.adapter.format import SlabHeader
from loraserve.clock import Clock
from loraserve.engine.landing import Landing
from loraserve.engine.pool_memory import HostPool, PoolMemory
from loraserve.engine.slab_reader import Loaded, SlabReader, Watch
from loraserve.engine.source import LoadFailed, Source
from loraserve.engine.source_order import FROM_STORE, hedge_after_s
from loraserve.engine.sources import Sources
from loraserve.log import get_logger
from loraserve.messages import AdapterRef, ReadCounts
from loraserve.threads import ended

ASK_AGAIN_S = 0.2
SPARE_PIECE_BYTES = 8 << 20


class SlabLoader:
    """Reads slabs straight into the pool's memory, bounded in time, memory and threads."""

    def __init__(self, sources: Sources, pool: PoolMemory, clock: Clock, timeout_s: float, digest_threads: int) -> None:
        self._sources = sources
        self._pool = pool
        self._timeout_s = timeout_s
        self._reader = SlabReader(sources.speeds, clock, digest_threads)
        self._hedging = False
        self._log = get_logger(__name__)

    def close(self) -> None:
        self._reader.close()

    def counts(self) -> tuple[ReadCounts, ...]:
        """What was read from where so far."""
        return self._reader.tally.counts(self._sources.speeds)

    async def load(self, adapter: AdapterRef, offset_bytes: int, watch: Watch | None = None) -> Loaded:
        """Read the slab to ``offset_bytes`` of the pool; a store that is restarted meanwhile is asked again. ``watch``
        hears of what is read there; where the slab came another way in the end the last it heard is that it is broken.

        Raises LoadFailed; the extent's content is then undefined, and no thread is at it any more.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                while True:
                    sources = await self._sources.find(adapter)
                    try:
                        return await self._from_any(adapter, offset_bytes, sources, watch)
                    except LoadFailed as error:
                        if not error.passing:
                            raise
                    await asyncio.sleep(ASK_AGAIN_S)
        except TimeoutError as error:
            raise LoadFailed(
                "timeout", f"neither a peer nor the store sent all of it within {self._timeout_s:g} s"
            ) from error

    async def damaged_layer(self, header: SlabHeader, offset_bytes: int) -> int | None:
        """The first layer of a resident slab that is not what its digest is of, None where all are."""
        return await self._reader.damaged_layer(self._pool, header, offset_bytes, range(header.shape.layers))

    async def _from_any(
        self, adapter: AdapterRef, offset_bytes: int, sources: Sequence[Source], watch: Watch | None
    ) -> Loaded:
        """One after another. Of several failures it is the store's that is told, which has every adapter there is."""
        rest = deque(sources)
        while True:
            source = rest.popleft()
            spare = next((each for each in rest if each.way.source != source.way.source), None)
            try:
                return await self._read_or_hedge(adapter, offset_bytes, source, spare, watch)
            except LoadFailed as error:
                _stop_if_cancelled()
                if source.way == FROM_STORE:
                    of_store = error
                if not error.of_way:
                    rest = deque(each for each in rest if each.way.source != source.way.source)
                if not rest:
                    raise of_store from None

    async def _read_or_hedge(
        self, adapter: AdapterRef, offset_bytes: int, source: Source, spare: Source | None, watch: Watch | None
    ) -> Loaded:
        first = asyncio.ensure_future(self._reader.read(adapter, self._pool, offset_bytes, source, watch))
        try:
            if spare is not None:
                patience_s = hedge_after_s(self._sources.predicted_s(source, adapter.slab_bytes))
                await asyncio.wait([first], timeout=patience_s)
                while self._hedging and not first.done():
                    # Another load does, whose memory is all there is for that: then it is this one's turn.
                    await asyncio.wait([first], timeout=ASK_AGAIN_S)
            if spare is None or first.done():
                return await first
            return await self._race(adapter, offset_bytes, first, spare)
        finally:
            await _give_up(first)

    async def _race(
        self, adapter: AdapterRef, offset_bytes: int, first: "asyncio.Future[Loaded]", spare: Source
    ) -> Loaded:
        """Another source beside the first, into memory of its own: one at a time, which bounds that memory."""
        self._log.info("load_hedged", adapter=adapter.name, spare=spare.way.source, transport=spare.way.transport)
        # Nothing is zeroed: for 256 MiB that would hold up the event loop for a tenth of a second and more.
        beside = HostPool(np.empty(adapter.slab_bytes, np.uint8).data)
        second = asyncio.ensure_future(self._reader.read(adapter, beside, 0, spare))
        self._hedging = True
        try:
            await asyncio.wait([first, second], return_when=asyncio.FIRST_COMPLETED)
            if (first.done() and first.exception() is None) or (second.done() and second.exception() is not None):
                return await first
            try:
                loaded = await second
            except LoadFailed:
                # The first had failed before: what is told of it is its own failure.
                return await first
            await _give_up(first)
            await self._bring(beside, adapter, loaded.header, offset_bytes)
            return loaded
        finally:
            try:
                await _give_up(second)
            finally:
                self._hedging = False

    async def _bring(self, beside: HostPool, adapter: AdapterRef, header: SlabHeader, offset_bytes: int) -> None:
        async def fetch(start: int, length: int) -> memoryview:
            return beside.view(start, length)

        async def copy(landing: Landing) -> None:
            await landing.stream(SPARE_PIECE_BYTES, fetch)

        await self._reader.fill(adapter, header, self._pool, offset_bytes, copy)


def _stop_if_cancelled() -> None:
    """Tasks that fail while they are cancelled tell of the failure alone, and a deadline cancels but once."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def _give_up(read: "asyncio.Future[Loaded]") -> None:
    """Unless it is over. Afterwards nobody is at its memory any more."""
    read.cancel()
    if await ended(read):
        # The load is given up as well.
        raise asyncio.CancelledError
