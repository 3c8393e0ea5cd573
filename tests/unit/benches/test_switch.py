"""The switch between virtual hosts: which packets are lost, which wait, and that they keep their order."""

import socket
from random import Random

import pytest

from loraserve.benchmarks.hosts.switch import QUEUE_PACKETS, Change, Links, Rule

ADDRESSES = [socket.inet_aton(f"10.77.0.{number + 1}") for number in range(3)]
CUT = Rule(loss=1.0)


def packet(target: int, content: int = 0) -> bytes:
    return bytes([0x45]) + bytes(11) + ADDRESSES[0] + ADDRESSES[target] + content.to_bytes(4, "big")


@pytest.fixture
def links() -> Links:
    return Links(ADDRESSES, Random(0))


def test_packets_go_to_the_host_of_their_address_and_others_are_dropped(links: Links) -> None:
    assert links.receive(0, packet(2), 0.0) == 2
    assert links.receive(0, bytes([0x60]) + packet(2)[1:], 0.0) is None, "IPv6 is not forwarded"
    assert links.receive(0, packet(0)[:16] + b"\x08\x08\x08\x08", 0.0) is None, "no host has this address"


def test_a_cut_loses_one_direction_only(links: Links) -> None:
    links.set_rule(Change(0, 1, CUT))
    assert links.receive(0, packet(1), 0.0) is None
    assert links.receive(1, packet(0), 0.0) == 0
    assert links.receive(0, packet(2), 0.0) == 2
    links.set_rule(Change(0, 1, Rule()))
    assert links.receive(0, packet(1), 0.0) == 1
    assert links.dropped == 1


def test_loss_is_drawn_for_each_packet(links: Links) -> None:
    links.set_rule(Change(0, 1, Rule(loss=0.05)))
    lost = sum(links.receive(0, packet(1), 0.0) is None for _ in range(10_000))
    assert 400 < lost < 600
    assert links.dropped == lost


def test_delayed_packets_arrive_in_order_also_after_the_delay_ends(links: Links) -> None:
    links.set_rule(Change(0, 1, Rule(delay_s=0.2)))
    assert links.receive(0, packet(1, 1), 1.0) is None
    links.set_rule(Change(0, 1, Rule()))
    assert links.receive(0, packet(1, 2), 1.1) is None, "it must not overtake the first"
    assert links.next_due_s() == pytest.approx(1.2)
    assert links.take_due(1.19) == []
    assert links.take_due(1.2) == [(1, packet(1, 1)), (1, packet(1, 2))]
    assert links.next_due_s() is None
    assert links.receive(0, packet(1, 3), 1.3) == 1


def test_a_cut_also_loses_the_packets_on_their_way(links: Links) -> None:
    links.set_rule(Change(0, 1, Rule(delay_s=0.2)))
    links.receive(0, packet(1), 0.0)
    links.set_rule(Change(0, 1, CUT))
    assert links.take_due(1.0) == []
    assert links.dropped == 1


def test_the_queue_of_a_direction_is_bounded(links: Links) -> None:
    links.set_rule(Change(0, 1, Rule(delay_s=0.2)))
    for _ in range(QUEUE_PACKETS + 5):
        links.receive(0, packet(1), 0.0)
    assert links.dropped == 5
