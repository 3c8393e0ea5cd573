"""The interface of slab sources, the errors of their reads, and the store as a source."""

from typing import Protocol, TypeVar

import msgspec

from loraserve.adapter.format import SlabHeader, decode_header, slab_version
from loraserve.bus.protocol import Bus, Frame
from loraserve.engine.loading.memory import Bytes, TransferTarget
from loraserve.engine.loading.speeds import FROM_STORE, STORE, ReadSource
from loraserve.errors import PeerError, RequestTimeoutError
from loraserve.messages import AdapterRef, OpenSlab, ReadSlab, SlabChunk, SlabInfo

T = TypeVar("T")


class SlabReadError(Exception):
    """A slab could not be read. ``code`` is ``not_found``, ``timeout``, ``corrupt``, ``mismatch`` or the source's code.

    ``is_temporary`` means that the read may soon succeed from the same source. ``other_transport`` means that it may
    succeed over another transport of the same peer.
    """

    def __init__(self, code: str, message: str, is_temporary: bool = False, other_transport: bool = False) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.is_temporary = is_temporary
        self.other_transport = other_transport


class DamagedSlabError(SlabReadError):
    """The bytes of ``layer`` do not match its digest in the header."""

    def __init__(self, layer: int) -> None:
        super().__init__("corrupt", f"layer {layer} does not match its digest; register the adapter again")
        self.layer = layer


class SlabSource(Protocol):
    """One attempt to read one slab: call ``open``, then ``copy``. Always call ``close``, also after an error."""

    source: ReadSource

    async def open(self, adapter: AdapterRef) -> SlabHeader:
        """Return the header of the adapter's slab, verified against its version. Raises SlabReadError."""
        ...

    async def copy(self, adapter: AdapterRef, target: TransferTarget) -> None:
        """Fill the target in order. Raises SlabReadError; then nothing writes to the target any more."""
        ...

    def close(self, damaged: DamagedSlabError | None) -> None:
        """Release the source. ``damaged`` names the damaged layer, if the slab that was read has one."""
        ...


class LocalSource(Protocol):
    """The host cache, as a provider of slab sources."""

    async def find(self, adapter: AdapterRef) -> SlabSource | None: ...


def check_header(adapter: AdapterRef, frame: Frame | None, claimed_bytes: int, owner: str) -> SlabHeader:
    """Decode the header in the answer of ``owner``. Raises SlabReadError unless it matches ``adapter``."""
    try:
        header = decode_header(bytes(frame or b""))
    except msgspec.DecodeError as error:
        raise SlabReadError("corrupt", f"the slab's header cannot be read: {error}") from error
    if not claimed_bytes == header.slab_bytes == adapter.slab_bytes:
        raise SlabReadError(
            "mismatch",
            f"slab_bytes is {adapter.slab_bytes} in the request, {claimed_bytes} in {owner} and "
            f"{header.slab_bytes} in the header; register the adapter again",
        )
    if slab_version(header) != adapter.version:
        raise SlabReadError("corrupt", "the slab's header is of another version; register the adapter again")
    return header


class StoreSource:
    """Reads a slab in chunks from the store over the bus. Errors are temporary while the store restarts."""

    source = FROM_STORE

    def __init__(self, bus: Bus, chunk_bytes: int, timeout_s: float) -> None:
        self._bus = bus
        self._chunk_bytes = chunk_bytes
        self._timeout_s = timeout_s

    async def open(self, adapter: AdapterRef) -> SlabHeader:
        info, frames = await self._ask(OpenSlab(version=adapter.version), SlabInfo)
        return check_header(adapter, frames[0] if frames else None, info.slab_bytes, "the store")

    async def copy(self, adapter: AdapterRef, target: TransferTarget) -> None:

        async def fetch(start: int, length: int) -> Bytes:
            request = ReadSlab(version=adapter.version, offset_bytes=start, length_bytes=length)
            _, frames = await self._ask(request, SlabChunk)
            if [len(frame) for frame in frames] != [length]:
                raise SlabReadError("corrupt", f"asked for {length} bytes at {start}, the answer has another size")
            return frames[0]

        await target.stream(self._chunk_bytes, fetch)

    def close(self, damaged: DamagedSlabError | None) -> None:
        """Do nothing: the store keeps no state for a read."""

    async def _ask(self, message: OpenSlab | ReadSlab, reply: type[T]) -> tuple[T, tuple[bytes | memoryview, ...]]:
        try:
            return await self._bus.request_frames(STORE, message, reply, self._timeout_s)
        except RequestTimeoutError as error:
            raise SlabReadError("timeout", f"the store did not answer: {error}", is_temporary=True) from error
        except PeerError as error:
            raise SlabReadError(error.code, error.message, is_temporary=error.code == "starting") from error
