"""The order in which the sources of an adapter are tried."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from loraserve.config import TransferConfig
from loraserve.engine.loading.speeds import (
    FROM_STORE,
    HEDGE_FLOOR_S,
    MIB,
    MOST_PEERS,
    LinkSpeeds,
    ReadSource,
    hedge_after_s,
    order_sources,
)
from loraserve.messages import Holder
from loraserve.messages.transfer import TRANSFER_PROTOCOL_VERSION, Abilities

ALL = TransferConfig().transports
HERE = Abilities(
    protocol=TRANSFER_PROTOCOL_VERSION, host="a", neighbourhood="n", transports=("shm", "tcp"), device="cpu"
)
THERE = msgspec.structs.replace(HERE, host="b")


def holder(name: str, abilities: Abilities = HERE) -> Holder:
    return Holder(engine=name, incarnation="i1", abilities=abilities)


def order(speeds: LinkSpeeds, *holders: Holder, mine: Abilities | None = HERE, now: float = 0.0) -> list[ReadSource]:
    return order_sources(holders, mine, ALL, speeds, 16 * MIB, now)


def test_a_neighbour_comes_first_then_the_network_then_the_store() -> None:
    found = order(LinkSpeeds(), holder("far", THERE), holder("near"))
    assert found == [ReadSource("near", "shm"), ReadSource("near", "tcp"), ReadSource("far", "tcp"), FROM_STORE]


def test_without_readable_holders_only_the_store_is_left() -> None:
    newer = msgspec.structs.replace(HERE, protocol=TRANSFER_PROTOCOL_VERSION + 1)
    assert order(LinkSpeeds()) == [FROM_STORE]
    assert order(LinkSpeeds(), holder("near"), mine=None) == [FROM_STORE]
    assert order(LinkSpeeds(), holder("near", newer)) == [FROM_STORE]


def test_a_faster_store_comes_first_and_a_failed_source_last() -> None:
    speeds = LinkSpeeds()
    for _ in range(20):
        speeds.begin_read(FROM_STORE)
        speeds.finish_read(FROM_STORE, 16 * MIB, 0.001)
    assert order(speeds, holder("near"))[0] == FROM_STORE
    speeds.begin_read(FROM_STORE)
    speeds.fail_read(FROM_STORE, now=5.0)
    assert order(speeds, holder("near"), now=5.5) == [ReadSource("near", "shm"), ReadSource("near", "tcp"), FROM_STORE]
    assert order(speeds, holder("near"), now=6.5)[0] == FROM_STORE


def test_an_idle_peer_comes_before_a_busy_one() -> None:
    speeds = LinkSpeeds()
    speeds.begin_read(ReadSource("a", "shm"))
    assert order(speeds, holder("a"), holder("b"))[0] == ReadSource("b", "shm")


@given(st.lists(st.sampled_from([HERE, THERE]), max_size=12), st.sets(st.integers(0, 11)))
def test_the_store_is_always_included_and_each_source_once(where: list[Abilities], failed: set[int]) -> None:
    speeds = LinkSpeeds()
    for number in failed:
        speeds.begin_read(ReadSource(f"e{number}", "tcp"))
        speeds.fail_read(ReadSource(f"e{number}", "tcp"), now=0.0)
    found = order(speeds, *(holder(f"e{number}", each) for number, each in enumerate(where)))
    assert FROM_STORE in found
    assert len(set(found)) == len(found)
    assert len({way.name for way in found}) <= MOST_PEERS + 1


def test_a_hedge_waits_at_least_the_floor() -> None:
    assert hedge_after_s(0.001) == HEDGE_FLOOR_S
    assert hedge_after_s(10.0) > 10.0
