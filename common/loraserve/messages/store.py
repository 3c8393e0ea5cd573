"""Any process -> store: manage adapters and read their slabs. Also the store's publication ``registry``."""

from loraserve.messages.base import AdapterRef, Message


class RegisterAdapter(Message, frozen=True, tag=True, kw_only=True):
    """Request: check, pack and keep the PEFT directory at ``path`` on the store's machine.

    Answered by AdapterRegistered. If the name exists with the same content, ``created`` is False. If it exists with
    other content, the request is refused with ``duplicate`` unless ``replace``. Other refusals have the codes of
    AdapterError.
    """

    name: str
    path: str
    replace: bool = False


class AdapterRegistered(Message, frozen=True, tag=True, kw_only=True):
    adapter: AdapterRef
    created: bool


class UnregisterAdapter(Message, frozen=True, tag=True, kw_only=True):
    """Request: remove the name. Running requests finish. Answered by AdapterUnregistered.

    Refused with ``not_found`` if the name is unknown.
    """

    name: str


class AdapterUnregistered(Message, frozen=True, tag=True, kw_only=True):
    name: str


class ListAdapters(Message, frozen=True, tag=True, kw_only=True):
    """Request: list all adapters. Answered by AdapterList."""


class AdapterList(Message, frozen=True, tag=True, kw_only=True):
    revision: int
    adapters: tuple[AdapterRef, ...]


class RegistryChanged(Message, frozen=True, tag=True, kw_only=True):
    """Publication ``registry``: all adapters, on every change and every ``store.publish_interval_s``.

    ``revision`` increases, even across restarts of the store.
    """

    revision: int
    adapters: tuple[AdapterRef, ...]


class OpenSlab(Message, frozen=True, tag=True, kw_only=True):
    """Request: describe a slab. Answered by SlabInfo and a raw frame, its header. Refused if not found or corrupt."""

    version: str


class SlabInfo(Message, frozen=True, tag=True, kw_only=True):
    version: str
    slab_bytes: int


class ReadSlab(Message, frozen=True, tag=True, kw_only=True):
    """Request: read a range of a slab. Answered by SlabChunk and one raw frame of ``length_bytes``."""

    version: str
    offset_bytes: int
    length_bytes: int


class SlabChunk(Message, frozen=True, tag=True, kw_only=True):
    version: str
    offset_bytes: int
