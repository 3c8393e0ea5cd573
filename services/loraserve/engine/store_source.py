"""The store as a source: chunks of the slab over the bus, each asked for by its range."""

from typing import TypeVar

from loraserve.adapter.format import SlabHeader
from loraserve.bus.protocol import Bus
from loraserve.engine.landing import Landing
from loraserve.engine.link_speeds import STORE
from loraserve.engine.pool_memory import Bytes
from loraserve.engine.source import Damaged, LoadFailed, checked_header
from loraserve.engine.source_order import FROM_STORE
from loraserve.errors import PeerError, RequestTimeout
from loraserve.messages import AdapterRef, OpenSlab, ReadSlab, SlabChunk, SlabInfo

T = TypeVar("T")


class StoreSource:
    """See Source. A store that is restarted meanwhile is no reason to give up."""

    way = FROM_STORE

    def __init__(self, bus: Bus, chunk_bytes: int, timeout_s: float) -> None:
        self._bus = bus
        self._chunk_bytes = chunk_bytes
        self._timeout_s = timeout_s

    async def open(self, adapter: AdapterRef) -> SlabHeader:
        info, frames = await self._ask(OpenSlab(version=adapter.version), SlabInfo)
        return checked_header(adapter, frames[0] if frames else None, info.slab_bytes, "the store")

    async def copy(self, adapter: AdapterRef, landing: Landing) -> None:
        async def fetch(start: int, length: int) -> Bytes:
            asked = ReadSlab(version=adapter.version, offset_bytes=start, length_bytes=length)
            _, frames = await self._ask(asked, SlabChunk)
            if [len(frame) for frame in frames] != [length]:
                raise LoadFailed("corrupt", f"asked for {length} bytes at {start}, the answer has another size")
            return frames[0]

        await landing.stream(self._chunk_bytes, fetch)

    def close(self, damaged: Damaged | None) -> None:
        """Nothing is held between chunks."""

    async def _ask(self, message: OpenSlab | ReadSlab, reply: type[T]) -> tuple[T, tuple[bytes | memoryview, ...]]:
        try:
            return await self._bus.request_frames(STORE, message, reply, self._timeout_s)
        except RequestTimeout as error:
            raise LoadFailed("timeout", f"the store did not answer: {error}", passing=True) from error
        except PeerError as error:
            raise LoadFailed(error.code, error.message, passing=error.code == "starting") from error
