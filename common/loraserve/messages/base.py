"""The protocol version, the base class of messages, and adapter references."""

import msgspec

PROTOCOL_VERSION = 9


class Message(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Base class of every message. The class name is the tag on the wire."""


class AdapterRef(msgspec.Struct, frozen=True, kw_only=True):
    """One version of a named adapter. ``version`` is the digest of its slab header, ``rank`` its largest rank."""

    name: str
    version: str
    rank: int
    slab_bytes: int
