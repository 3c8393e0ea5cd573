"""Handles round-trip, and impossible reads are refused before a byte is written."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.messages.transfer import TRANSFER_PROTOCOL_VERSION, Handle, ShmHandle, TcpHandle, VerbsHandle
from loraserve.transfer.protocol import ByteRange, TransferError, check_read, code_of_refusal, split_ranges

LENGTH = 1000
COMMON: dict[str, Any] = {
    "protocol": TRANSFER_PROTOCOL_VERSION,
    "owner": "engine-1",
    "incarnation": "i",
    "length_bytes": LENGTH,
}
TCP = TcpHandle(**COMMON, token="t")
SHM = ShmHandle(**COMMON, pid=1, descriptor=3, name="n")
VERBS = VerbsHandle(**COMMON, base=1 << 46, key=7)

ranges_within = st.lists(
    st.integers(0, LENGTH).flatmap(lambda start: st.builds(ByteRange, st.just(start), st.integers(0, LENGTH - start))),
    max_size=5,
)


def buffer(ranges: list[ByteRange]) -> bytearray:
    return bytearray(sum(each.length_bytes for each in ranges))


def refusal(handle: Handle, ranges: list[ByteRange], into: memoryview) -> TransferError:
    with pytest.raises(TransferError) as refused:
        check_read(handle, TcpHandle, ranges, into)
    assert "engine-1" in refused.value.message
    return refused.value


@pytest.mark.parametrize("handle", [TCP, SHM, VERBS])
def test_a_handle_survives_the_wire_and_keeps_its_kind(handle: Handle) -> None:
    wire = msgspec.msgpack.encode(handle)
    assert msgspec.msgpack.decode(wire, type=Handle) == handle
    assert msgspec.msgpack.decode(wire)["type"] == type(handle).__name__


@pytest.mark.parametrize("field", ["protocol", "owner", "incarnation", "length_bytes", "token"])
def test_a_handle_without_one_of_its_fields_is_none(field: str) -> None:
    sent = msgspec.to_builtins(TCP)
    del sent[field]
    with pytest.raises(msgspec.ValidationError, match=field):
        msgspec.convert(sent, Handle)


@given(ranges_within)
def test_ranges_within_the_region_are_accepted(ranges: list[ByteRange]) -> None:
    handle, into = check_read(TCP, TcpHandle, ranges, memoryview(buffer(ranges)))
    assert handle is TCP
    assert into.nbytes == sum(each.length_bytes for each in ranges)


@given(ranges_within, st.integers(-LENGTH, 2 * LENGTH), st.integers(-LENGTH, 2 * LENGTH), st.integers(0, 5))
def test_one_range_that_is_not_within_spoils_all(ranges: list[ByteRange], start: int, length: int, at: int) -> None:
    within = start >= 0 and length >= 0 and start + length <= LENGTH
    ranges.insert(at, ByteRange(start, length))
    into = memoryview(bytearray(max(0, sum(each.length_bytes for each in ranges))))
    if within:
        check_read(TCP, TcpHandle, ranges, into)
    else:
        assert refusal(TCP, ranges, into).code == "out_of_range"


@given(ranges_within, st.integers(0, LENGTH))
def test_a_buffer_of_another_size_is_refused(ranges: list[ByteRange], size: int) -> None:
    if size != len(buffer(ranges)):
        error = refusal(TCP, ranges, memoryview(bytearray(size)))
        assert error.code == "size"
        assert f"has {size}" in error.message


def test_another_protocol_version_is_refused_before_all_else() -> None:
    newer = msgspec.structs.replace(TCP, protocol=TRANSFER_PROTOCOL_VERSION + 1)
    error = refusal(newer, [ByteRange(LENGTH, 1)], memoryview(bytearray(5)))
    assert error.code == "version"
    assert "same release" in error.message


def test_another_transport_s_handle_is_refused() -> None:
    error = refusal(SHM, [ByteRange(0, 1)], memoryview(bytearray(1)))
    assert error.code == "refused"
    assert "handles tcp only" in error.message


@pytest.mark.parametrize("into", [memoryview(b"12"), memoryview(bytearray(4))[::2]])
def test_a_buffer_that_cannot_be_filled_is_refused(into: memoryview) -> None:
    assert refusal(TCP, [ByteRange(0, 2)], into).code == "refused"


def test_a_buffer_of_other_elements_is_used_as_bytes() -> None:
    _, into = check_read(TCP, TcpHandle, [ByteRange(0, 8)], memoryview(bytearray(8)).cast("H"))
    assert (into.format, len(into)) == ("B", 8)


@given(ranges_within, st.integers(1, LENGTH))
def test_pieces_are_the_ranges_in_order_and_fill_the_buffer_without_gaps(ranges: list[ByteRange], longest: int) -> None:
    region = bytes(index % 251 for index in range(LENGTH))
    into = buffer(ranges)
    cut = list(split_ranges(ranges, longest))
    for at, each in cut:
        into[at : at + each.length_bytes] = region[each.offset_bytes : each.offset_bytes + each.length_bytes]
    whole = b"".join(region[each.offset_bytes : each.offset_bytes + each.length_bytes] for each in ranges)
    assert bytes(into) == whole
    assert all(0 < each.length_bytes <= longest for _, each in cut)
    assert sum(each.length_bytes for _, each in cut) == len(whole)


def test_an_unknown_error_code_becomes_refused() -> None:
    assert [code_of_refusal(code) for code in ("gone", "timeout", "pigeon", "")] == [
        "gone",
        "timeout",
        "refused",
        "refused",
    ]
