"""The order of pieces, the choice of addresses, the meaning of statuses, and the listing of ports."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.transfer.protocol import ByteRange, split_ranges
from loraserve.transfer.verbs.device import Port, unusable_reason, usable_ports
from loraserve.transfer.verbs.plan import FLUSHED, PieceQueue, best_gid, concerns_one, failure

IPV4 = "0000:0000:0000:0000:0000:ffff:c000:0201"
IPV6 = "2001:0db8:0000:0000:0000:0000:0000:0001"
LOCAL = "fe80:0000:0000:0000:0000:0000:0000:0001"
NONE = "0000:0000:0000:0000:0000:0000:0000:0000"


def test_a_short_read_does_not_wait_for_the_rest_of_a_long_one() -> None:
    turns = PieceQueue(depth=2)
    turns.add(0, split_ranges([ByteRange(0, 30)], 10))
    assert turns.next() == (0, 0, 0, ByteRange(0, 10))
    turns.add(1, split_ranges([ByteRange(7, 3)], 10))
    assert turns.next() == (1, 0, 10, ByteRange(10, 10))
    assert turns.next() is None, "so many are under way"
    assert turns.arrived(0) is None
    assert turns.next() == (2, 1, 0, ByteRange(7, 3))
    assert turns.arrived(2) == 1
    assert turns.next() == (3, 0, 20, ByteRange(20, 10))
    assert turns.arrived(3) is None
    assert not turns.idle
    assert turns.arrived(1) == 0
    assert turns.idle


def test_a_dropped_read_completes_with_its_pieces_in_flight() -> None:
    turns = PieceQueue(depth=4, first=5 << 32)
    turns.add(0, split_ranges([ByteRange(0, 30)], 10))
    turns.add(1, split_ranges([ByteRange(0, 10)], 10))
    asked = turns.next()
    assert asked is not None
    number = asked[0]
    assert number == 5 << 32
    assert turns.drop(0) is None
    assert turns.read_of(number) == 0
    assert turns.drop(1) == 1, "nothing of it was asked for"
    assert turns.drop(1) is None
    assert turns.next() is None
    assert turns.arrived(number) == 0
    assert turns.read_of(number) is None


@given(
    st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=4), max_size=8),
    st.integers(1, 5),
    st.integers(1, 20),
    st.randoms(use_true_random=False),
)
def test_every_piece_of_every_read_is_asked_for_once(
    reads: list[list[int]], depth: int, piece_bytes: int, choose: random.Random
) -> None:
    """Every read completes once, for any order of arrivals and with dropped reads."""
    turns = PieceQueue(depth)
    wanted = {
        i: list(split_ranges([ByteRange(0, length) for length in lengths], piece_bytes))
        for i, lengths in enumerate(reads)
    }
    asked: dict[int, list[tuple[int, ByteRange]]] = {i: [] for i in wanted}
    begun, under_way, dropped = 0, list[int](), set[int]()
    ended: list[int | None] = []
    while begun < len(reads) or not turns.idle:
        turns.validate()
        if begun < len(reads) and choose.random() < 0.3:
            turns.add(begun, wanted[begun])
            begun += 1
        elif choose.random() < 0.1 and begun:
            one = choose.randrange(begun)
            if one not in ended:
                dropped.add(one)
            ended.append(turns.drop(one))
        elif (piece := turns.next()) is not None:
            number, read, at_bytes, part = piece
            assert read not in dropped
            asked[read].append((at_bytes, part))
            under_way.append(number)
        elif under_way:
            ended.append(turns.arrived(under_way.pop(choose.randrange(len(under_way)))))
    assert sorted(each for each in ended if each is not None) == list(wanted)
    assert all(
        asked[i] == parts or (i in dropped and asked[i] == parts[: len(asked[i])]) for i, parts in wanted.items()
    )


@pytest.mark.parametrize(
    ("offered", "taken"),
    [
        ([(0, LOCAL, "RoCE v2"), (1, IPV4, "IB/RoCE v1"), (2, IPV6, "RoCE v2"), (3, IPV4, "RoCE v2")], (3, IPV4)),
        ([(0, LOCAL, "RoCE v2"), (2, IPV6, "RoCE v2")], (2, IPV6)),
        ([(0, LOCAL, "IB/RoCE v1"), (1, LOCAL, "RoCE v2")], (1, LOCAL)),
        ([(0, LOCAL, "IB/RoCE v1"), (1, IPV6, "IB/RoCE v1")], (1, IPV6)),
        ([(0, NONE, "RoCE v2")], None),
        ([], None),
    ],
)
def test_the_gid_with_the_widest_reach_is_chosen(
    offered: list[tuple[int, str, str]], taken: tuple[int, str] | None
) -> None:
    assert best_gid(offered) == taken


@pytest.mark.parametrize(("status", "code"), [(10, "gone"), (9, "gone"), (12, "gone"), (4, "refused"), (21, "refused")])
def test_a_status_says_whether_the_memory_is_gone(status: int, code: str) -> None:
    assert failure(status)[0] == code
    assert "another source" in failure(status)[1]


def test_a_silent_peer_fails_all_reads_and_a_wrong_key_only_its_own() -> None:
    assert concerns_one(10)
    assert concerns_one(4)
    assert not concerns_one(12)
    assert not concerns_one(FLUSHED)


def device(root: Path, name: str, state: str, gids: dict[int, tuple[str, str]], places: int = 40) -> None:
    port = root / name / "ports" / "1"
    (port / "gids").mkdir(parents=True)
    (port / "gid_attrs" / "types").mkdir(parents=True)
    (port / "state").write_text(f"{state}\n")
    (port / "link_layer").write_text("Ethernet\n")
    for index in range(places):
        (port / "gids" / str(index)).write_text(gids.get(index, (NONE, ""))[0] + "\n")
    for index, (_, kind) in gids.items():
        (port / "gid_attrs" / "types" / str(index)).write_text(f"{kind}\n")


def test_ports_that_are_up_are_found_with_their_best_address(tmp_path: Path) -> None:
    device(tmp_path, "rxe1", "4: ACTIVE", {0: (LOCAL, "RoCE v2"), 3: (IPV4, "RoCE v2"), 30: (IPV6, "RoCE v2")})
    device(tmp_path, "rxe0", "1: DOWN", {0: (IPV4, "RoCE v2")})
    device(tmp_path, "rxe2", "4: ACTIVE", {})
    assert usable_ports(tmp_path) == [
        Port(device="rxe1", number=1, gid_index=3, gid=IPV4, link_layer="Ethernet"),
    ]


def test_the_reason_why_verbs_cannot_be_used_is_returned(tmp_path: Path) -> None:
    assert "no RDMA device" in unusable_reason(tmp_path / "none")
    assert "no RDMA device" in unusable_reason(tmp_path)
    device(tmp_path, "rxe0", "1: DOWN", {0: (IPV4, "RoCE v2")})
    assert "is up" in unusable_reason(tmp_path)
