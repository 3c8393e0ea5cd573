"""The wire format of messages, used by every transport.

A message consists of the parts ``[kind][correlation, 8 bytes][MessagePack][raw frames...]``. A publication is
``[v<version>/<topic>][MessagePack]``. Each connection starts with a hello that names the sender.
"""

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from loraserve.bus.protocol import Frame
from loraserve.messages.base import PROTOCOL_VERSION

SEND = b"S"
REQUEST = b"Q"
REPLY = b"R"
ERROR = b"E"
NO_CORRELATION = bytes(8)

NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_HELLO = re.compile(rb"loraserve/(\d{1,9})\|([a-z0-9][a-z0-9._-]{0,63})\|([0-9a-f]{16})")

_encoder = msgspec.msgpack.Encoder()

Parts = list[Frame]


class Hello(msgspec.Struct, frozen=True):
    """The identity that a connecting process claims. ``refusal`` is the reason to refuse its messages, or ""."""

    name: str
    incarnation: str
    refusal: str = ""


class Refusal(msgspec.Struct, frozen=True, array_like=True):
    """The payload of an answer of kind ERROR."""

    code: str
    message: str


class BadPartsError(Exception):
    """The received parts are not a valid message."""


def encode_hello(name: str, incarnation: str, version: int = PROTOCOL_VERSION) -> bytes:
    return f"loraserve/{version}|{name}|{incarnation}".encode()


def parse_hello(data: bytes) -> Hello:
    """Decode a hello. An invalid hello gives a Hello with a ``refusal``, which is sent in answers to the sender."""
    match = _HELLO.fullmatch(data)
    if match is None:
        return Hello("?", "", "the connection sent no loraserve hello; is the peer a loraserve process?")
    name, incarnation = match[2].decode(), match[3].decode()
    version = int(match[1])
    if version != PROTOCOL_VERSION:
        text = f"{name} uses protocol {version}, this process {PROTOCOL_VERSION}; run the same release everywhere"
        return Hello(name, incarnation, text)
    return Hello(name, incarnation)


def pack_message(kind: bytes, correlation: bytes, message: Any, frames: Sequence[Frame] = ()) -> Parts:
    return [kind, correlation, _encoder.encode(message), *frames]


def split_message(parts: Sequence[Frame]) -> tuple[bytes, bytes, Frame, tuple[Frame, ...]]:
    """Split a message into (kind, correlation, payload, raw frames). Raises BadPartsError."""
    if len(parts) < 3:
        raise BadPartsError(f"{len(parts)} parts, expected at least kind, correlation and payload")
    kind, correlation = bytes(parts[0]), bytes(parts[1])
    if kind not in (SEND, REQUEST, REPLY, ERROR):
        raise BadPartsError(f"unknown kind {kind[:16]!r}")
    if len(correlation) != len(NO_CORRELATION):
        raise BadPartsError(f"correlation of {len(correlation)} bytes, expected {len(NO_CORRELATION)}")
    return kind, correlation, parts[2], tuple(parts[3:])


def topic_frame(topic: str) -> bytes:
    """Encode a topic with the protocol version. Subscribers never receive publications of another version."""
    return f"v{PROTOCOL_VERSION}/{topic}".encode()


def pack_publication(topic: str, message: Any) -> Parts:
    return [topic_frame(topic), _encoder.encode(message)]


def decode_payload(decoder: "msgspec.msgpack.Decoder[Any]", payload: Frame) -> Any:
    """Decode a payload strictly. Raises msgspec.DecodeError, which names the path of the invalid value."""
    try:
        return decoder.decode(payload)
    except msgspec.DecodeError:
        raise
    except (ValueError, OverflowError, RecursionError) as error:
        # msgspec does not wrap the errors of invalid UTF-8, invalid dates and too deep nesting.
        raise msgspec.DecodeError(f"MessagePack data is malformed: {error}") from None
