"""Where a slab is read to: an extent of a pool, filled from its beginning on."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from loraserve.engine.pool_memory import Bytes, PoolMemory
from loraserve.threads import in_thread

PIECES_IN_FLIGHT = 2
"""One is copied while the next is on its way; more would only hold memory."""


class Landing:
    """``arrived`` hears how many bytes of the slab are there, whenever there are more."""

    def __init__(
        self,
        pool: PoolMemory,
        offset_bytes: int,
        slab_bytes: int,
        arrived: Callable[[int], None],
        writers: ThreadPoolExecutor,
    ) -> None:
        self.pool = pool
        self.offset_bytes = offset_bytes
        self.slab_bytes = slab_bytes
        self.arrived = arrived
        self._writers = writers

    def view(self) -> memoryview | None:
        """The extent as memory of this process; None where it is a device's."""
        return self.pool.view(self.offset_bytes, self.slab_bytes)

    async def stream(self, piece_bytes: int, fetch: Callable[[int, int], Awaitable[Bytes | None]]) -> None:
        """Everything, by pieces in order, a few in flight: ``fetch`` brings those of a start and a length, or None
        where it has put them in their place itself.

        A failing piece ends the whole: the others are cancelled, and are over when this ends.
        """
        waiting: deque[tuple[int, int, asyncio.Future[Bytes | None]]] = deque()
        starts = iter(range(0, self.slab_bytes, piece_bytes))
        try:
            while True:
                while len(waiting) < PIECES_IN_FLIGHT and (start := next(starts, None)) is not None:
                    length = min(piece_bytes, self.slab_bytes - start)
                    waiting.append((start, length, asyncio.ensure_future(fetch(start, length))))
                if not waiting:
                    return
                start, length, piece = waiting.popleft()
                data = await piece
                if data is not None:
                    await self._write(start, data)
                self.arrived(start + length)
        finally:
            for _, _, piece in waiting:
                piece.cancel()
            await asyncio.gather(*(piece for _, _, piece in waiting), return_exceptions=True)

    async def _write(self, start: int, data: Bytes) -> None:
        write = partial(self.pool.write, self.offset_bytes + start, data)
        if self.pool.waits:
            await in_thread(self._writers, write)
        else:
            write()
