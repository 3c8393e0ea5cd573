"""Sending and receiving the parts of messages over real sockets, without a bus."""

from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from loraserve.bus.link import COPY_BELOW_BYTES, Socket, is_readable, receive_now, send_now
from loraserve.bus.protocol import Frame

LARGE = bytes(range(256)) * (COPY_BELOW_BYTES // 256)
Pair = tuple[Socket, Socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Two connected sockets within this process, where a message has arrived once it is sent."""
    context: zmq.Context[Socket] = zmq.Context()
    ends = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    for end in ends:
        end.set(zmq.SNDHWM, 1)
        end.set(zmq.RCVHWM, 1)
    ends[0].bind("inproc://pair")
    ends[1].connect("inproc://pair")
    yield ends
    context.destroy(linger=0)


def test_parts_arrive_in_order_and_only_large_ones_are_not_copied(pair: Pair) -> None:
    sent, received = pair
    parts: list[Frame] = [b"first", b"", memoryview(LARGE), bytearray(b"small"), LARGE[:-1], LARGE]
    assert send_now(sent, parts)
    arrived = receive_now(received)
    assert arrived is not None
    assert [bytes(part) for part in arrived] == [bytes(part) for part in parts]
    assert [type(part) for part in arrived] == [bytes, bytes, memoryview, bytes, bytes, memoryview]
    assert receive_now(received) is None


def test_receiving_without_a_message_returns_none(pair: Pair) -> None:
    assert not is_readable(pair[1])
    assert receive_now(pair[1]) is None
    assert send_now(pair[0], [b"one"])
    assert is_readable(pair[1])


def test_a_message_with_an_invalid_part_is_not_sent_in_part(pair: Pair) -> None:
    sent, received = pair
    no_bytes: Any = 7
    with pytest.raises(TypeError):
        send_now(sent, [b"first", no_bytes, b"last"])
    assert send_now(sent, [b"whole"])
    assert receive_now(received) == [b"whole"]


def test_a_full_queue_accepts_no_part_of_a_message(pair: Pair) -> None:
    sent, received = pair
    taken = 0
    while send_now(sent, [b"a", b"b"]):
        taken += 1
    assert taken
    for _ in range(taken):
        assert receive_now(received) == [b"a", b"b"]
    assert receive_now(received) is None
    # Makes the sender process the notice that the queue has room again.
    is_readable(sent)
    assert send_now(sent, [b"c"])
    assert receive_now(received) == [b"c"]
