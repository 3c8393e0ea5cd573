"""A place that a slab can be read from, as the loader sees it, and how a read from it fails."""

from typing import Protocol, TypeVar

import msgspec

from loraserve.adapter.format import SlabHeader, decode_header, slab_version
from loraserve.bus.protocol import Bus, Frame
from loraserve.engine.loading.memory import Bytes, Landing
from loraserve.engine.loading.speeds import FROM_STORE, STORE, ReadSource
from loraserve.errors import PeerError, RequestTimeoutError
from loraserve.messages import AdapterRef, OpenSlab, ReadSlab, SlabChunk, SlabInfo


class LoadFailed(Exception):
    """The slab could not be had. ``code`` is ``not_found``, ``timeout``, ``corrupt``, ``mismatch`` or the source's.

    ``passing``: the same source may have it in a moment. ``of_way``: another transport from there may do.
    """

    def __init__(self, code: str, message: str, passing: bool = False, of_way: bool = False) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.passing = passing
        self.of_way = of_way


class Damaged(LoadFailed):
    """What was read is not what its digest is of, beginning with ``layer``."""

    def __init__(self, layer: int) -> None:
        super().__init__("corrupt", f"layer {layer} is not what its digest is of; register the adapter again")
        self.layer = layer


class Source(Protocol):
    """One try to read one slab. ``open`` first, then ``copy``, and ``close`` whatever happened."""

    way: ReadSource

    async def open(self, adapter: AdapterRef) -> SlabHeader:
        """A header that is of this version. Raises LoadFailed."""
        ...

    async def copy(self, adapter: AdapterRef, landing: Landing) -> None:
        """Fills the landing, from its beginning on. Raises LoadFailed; afterwards nobody writes to it any more."""
        ...

    def close(self, damaged: Damaged | None) -> None:
        """Lets go of what was opened; ``damaged`` says what was wrong with what was read."""
        ...


def checked_header(adapter: AdapterRef, frame: Frame | None, said_bytes: int, whose: str) -> SlabHeader:
    """What ``whose`` answer says the slab is. Raises LoadFailed unless that is the version that was asked for."""
    try:
        header = decode_header(bytes(frame or b""))
    except msgspec.DecodeError as error:
        raise LoadFailed("corrupt", f"the slab's header cannot be read: {error}") from error
    if not said_bytes == header.slab_bytes == adapter.slab_bytes:
        raise LoadFailed(
            "mismatch",
            f"slab_bytes is {adapter.slab_bytes} in the request, {said_bytes} in {whose} and "
            f"{header.slab_bytes} in the header; register the adapter again",
        )
    if slab_version(header) != adapter.version:
        raise LoadFailed("corrupt", "the slab's header is not what its version names; register the adapter again")
    return header


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
        except RequestTimeoutError as error:
            raise LoadFailed("timeout", f"the store did not answer: {error}", passing=True) from error
        except PeerError as error:
            raise LoadFailed(error.code, error.message, passing=error.code == "starting") from error
