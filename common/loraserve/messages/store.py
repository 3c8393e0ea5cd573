"""Anyone -> store, and the store's publication ``registry``."""

from loraserve.messages.base import AdapterRef, Message


class RegisterAdapter(Message, frozen=True, tag=True, kw_only=True):
    """Check, pack and keep the PEFT directory at ``path`` (as the store sees it). Answer: AdapterRegistered.

    A known name with the same content is answered ``created`` False; with other content it is refused with the code
    ``duplicate`` unless ``replace``. Other refusals carry the codes of AdapterError.
    """

    name: str
    path: str
    replace: bool = False


class AdapterRegistered(Message, frozen=True, tag=True, kw_only=True):
    adapter: AdapterRef
    created: bool


class UnregisterAdapter(Message, frozen=True, tag=True, kw_only=True):
    """Forget the name; running requests finish. Refused with ``not_found`` where it is unknown."""

    name: str


class AdapterUnregistered(Message, frozen=True, tag=True, kw_only=True):
    name: str


class ListAdapters(Message, frozen=True, tag=True, kw_only=True):
    """Answered by AdapterList."""


class AdapterList(Message, frozen=True, tag=True, kw_only=True):
    revision: int
    adapters: tuple[AdapterRef, ...]


class RegistryChanged(Message, frozen=True, tag=True, kw_only=True):
    """The whole registry, published on every change and every few seconds. ``revision`` grows over restarts too."""

    revision: int
    adapters: tuple[AdapterRef, ...]


class OpenSlab(Message, frozen=True, tag=True, kw_only=True):
    """Answered by SlabInfo and one raw frame: the slab's encoded header. Refused with ``not_found``."""

    version: str


class SlabInfo(Message, frozen=True, tag=True, kw_only=True):
    version: str
    slab_bytes: int


class ReadSlab(Message, frozen=True, tag=True, kw_only=True):
    """Answered by SlabChunk and one raw frame of exactly ``length_bytes``."""

    version: str
    offset_bytes: int
    length_bytes: int


class SlabChunk(Message, frozen=True, tag=True, kw_only=True):
    version: str
    offset_bytes: int
