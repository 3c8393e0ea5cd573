"""The wire format: hellos, messages, and harmless handling of arbitrary bytes."""

from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loraserve.bus import wire
from loraserve.messages import PROTOCOL_VERSION, Admit, Ping, SamplingParams, ToEngine, ToGateway, TokenBatch

INCARNATION = "0123456789abcdef"
ADMIT = Admit(request_id="r", gateway="g", prompt_tokens=(1, 2), sampling=SamplingParams(max_tokens=1))


def test_a_hello_names_version_process_and_incarnation() -> None:
    data = wire.encode_hello("engine-0", INCARNATION)
    assert data == f"loraserve/{PROTOCOL_VERSION}|engine-0|{INCARNATION}".encode()
    assert wire.parse_hello(data) == wire.Hello("engine-0", INCARNATION, "")


def test_another_version_is_refused_but_named() -> None:
    seen = wire.parse_hello(wire.encode_hello("engine-0", INCARNATION, PROTOCOL_VERSION + 1))
    assert (seen.name, seen.incarnation) == ("engine-0", INCARNATION)
    assert f"uses protocol {PROTOCOL_VERSION + 1}, this process {PROTOCOL_VERSION}" in seen.refusal


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00\x6b\x8b\x45\x67",
        b"loraserve/1",
        b"loraserve/|a|" + INCARNATION.encode(),
        b"loraserve/1|A|" + INCARNATION.encode(),
        b"loraserve/1||" + INCARNATION.encode(),
        b"loraserve/1|" + b"a" * 65 + b"|" + INCARNATION.encode(),
        b"loraserve/1|a|0123",
        b"loraserve/1|a|" + INCARNATION.encode() + b"\n",
        b"loraserve/1|a|" + INCARNATION.upper().encode(),
        b"loraserve/\xd9\xa1|a|" + INCARNATION.encode(),
    ],
)
def test_an_invalid_hello_has_an_unknown_sender(data: bytes) -> None:
    seen = wire.parse_hello(data)
    assert (seen.name, seen.incarnation) == ("?", "")
    assert "no loraserve hello" in seen.refusal


@given(st.binary(max_size=255))
def test_parsing_any_hello_raises_nothing(data: bytes) -> None:
    seen = wire.parse_hello(data)
    assert seen.refusal or wire.encode_hello(seen.name, seen.incarnation) == data


def test_a_message_is_kind_correlation_payload_and_frames() -> None:
    parts = wire.pack_message(wire.REQUEST, b"12345678", Ping(), [b"a", memoryview(b"bc")])
    assert parts[:2] == [b"Q", b"12345678"]
    kind, correlation, payload, frames = wire.split_message(parts)
    assert (kind, correlation, frames) == (wire.REQUEST, b"12345678", (b"a", b"bc"))
    assert msgspec.msgpack.decode(payload) == {"type": "Ping"}


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([], "0 parts"),
        ([b"S", bytes(8)], "2 parts"),
        ([b"Z", bytes(8), b""], "unknown kind b'Z'"),
        ([b"", bytes(8), b""], "unknown kind b''"),
        ([b"S" * 10_000, bytes(8), b""], "unknown kind b'SSSSSSSSSSSSSSSS'"),
        ([b"S", bytes(7), b""], "correlation of 7 bytes"),
    ],
)
def test_invalid_parts_are_refused(parts: list[bytes], words: str) -> None:
    with pytest.raises(wire.BadPartsError, match=words):
        wire.split_message(parts)


def test_a_publication_carries_the_version_in_its_topic() -> None:
    topic, payload = wire.pack_publication("load", Ping())
    assert topic == f"v{PROTOCOL_VERSION}/load".encode()
    assert msgspec.msgpack.decode(payload) == {"type": "Ping"}


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        ({"type": "Nothing"}, "Invalid value 'Nothing' - at `$.type`"),
        ({"request_id": "r"}, "missing required field `type`"),
        (msgspec.to_builtins(ADMIT) | {"gateway": 3}, "Expected `str`, got `int` - at `$.gateway`"),
        (msgspec.to_builtins(ADMIT) | {"prompt_tokens": [1, "2"]}, "got `str` - at `$.prompt_tokens[1]`"),
        (msgspec.to_builtins(ADMIT) | {"sampling": {"max_tokens": 1.5}}, "at `$.sampling.max_tokens`"),
        ([], "Expected `object`, got `array`"),
    ],
)
def test_a_wrong_message_is_refused_with_its_path(payload: Any, words: str) -> None:
    with pytest.raises(msgspec.DecodeError) as refused:
        wire.decode_payload(msgspec.msgpack.Decoder(ToEngine), msgspec.msgpack.encode(payload))
    assert words in str(refused.value)


GOOD = [
    bytes(wire.pack_message(wire.SEND, wire.NO_CORRELATION, message)[2])
    for message in (ADMIT, Ping(), TokenBatch(engine="e", incarnation="i", deltas=()))
]


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=64))
@example(b"\x81\xa4type\xa1\xff")
@example(b"\x91" * 100_000)
@example(b"\xdd\xff\xff\xff\xff")
@example(b"\xc7\x0c\xff" + b"\xff" * 12)
def test_arbitrary_bytes_raise_only_decode_errors(payload: bytes) -> None:
    decode_or_refuse(payload)


def decode_or_refuse(payload: bytes) -> None:
    for union in (ToEngine, ToGateway):
        try:
            message = wire.decode_payload(msgspec.msgpack.Decoder(union), payload)
        except msgspec.DecodeError:
            continue
        assert isinstance(message, union)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(GOOD), st.integers(0, 200), st.binary(min_size=1, max_size=3))
def test_damaged_messages_raise_only_decode_errors(good: bytes, at: int, damage: bytes) -> None:
    at %= len(good)
    decode_or_refuse(good[:at] + damage + good[at + len(damage) :])
