"""What all messages share: the protocol version, the base class, and adapter references."""

import msgspec

PROTOCOL_VERSION = 8


class Message(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Base of every message; the class name is the tag."""


class AdapterRef(msgspec.Struct, frozen=True, kw_only=True):
    """One version of a named adapter. ``version`` is the slab's digest, ``rank`` its largest rank."""

    name: str
    version: str
    rank: int
    slab_bytes: int
