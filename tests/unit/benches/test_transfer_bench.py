"""The figures of scripts/bench transfer."""

import itertools
import socket
import threading

import numpy as np
import pytest
import transfer
from harness.remote_figures import FULL, QUICK, Remote
from harness.remote_reads import READER_POOL_BYTES, Read, StepGaps, gaps_within
from harness.verbs import Slab, verbs_figures, verbs_ratio

from loraserve.cost import extent_bytes

RATIO_KEYS = {
    "shm_vs_memcpy",
    "tcp_vs_raw",
    "verbs_vs_ib_read_bw",
    "step_growth_while_loading",
    "remote_ttft_vs_resident",
}


def measured(**taken_s: list[float]) -> transfer.Measured:
    rest = {name: [1.0, 1.0, 1.0] for name in transfer.WAYS}
    return transfer.Measured(100, rest | taken_s)


def test_transports_are_compared_within_a_round() -> None:
    slowed_down = measured(shm=[2.0, 20.0, 4.0], memcpy=[1.0, 10.0, 4.0])
    assert slowed_down.over("shm", "memcpy") == 0.5
    assert slowed_down.bytes_per_s()["shm"] == 25.0


def test_successive_slabs_have_different_offsets() -> None:
    size = 64 << 20
    places = list(itertools.islice(transfer.places(size), 5))
    assert places == [0, size, 2 * size, 3 * size, 0]
    assert next(transfer.places(transfer.HELD_BYTES)) == 0


def test_ratios_are_of_the_worst_size_and_others_are_null() -> None:
    found = {1: measured(shm=[4.0] * 3, tcp=[1.0] * 3), 4: measured(shm=[2.0] * 3, tcp=[8.0] * 3)}
    ratios = transfer.ratios(found, [], None)
    assert set(ratios) == RATIO_KEYS
    assert {key: value for key, value in ratios.items() if value is not None} == {
        "shm_vs_memcpy": 0.25,
        "tcp_vs_raw": 0.125,
    }


READS = {
    "shm": [Read(0.3, 0.1, 0.02), Read(2.0, 1.0, 0.04), Read(0.2, 0.1, 0.03)],
    "tcp": [Read(0.4, 0.1, 0.05)],
    "store": [Read(0.5, 0.1, 0.06)],
}


def test_measurements_of_engines_and_verbs_are_reported() -> None:
    small = {**READS, "shm": [Read(0.15, 0.1, 0.01)]}
    remote = Remote({8: small, 64: READS}, StepGaps([0.05, 0.06, 0.07], [0.05, 0.05, 0.2], 100))
    verbs = [Slab(1, 80.0, 100.0, 0.8), Slab(4, 90.0, 100.0, 0.9)]
    ratios = transfer.ratios({1: measured()}, verbs, remote)
    assert set(ratios) == RATIO_KEYS
    assert ratios["remote_ttft_vs_resident"] == 2.0
    assert ratios["step_growth_while_loading"] == 0.2
    assert ratios["verbs_vs_ib_read_bw"] == 0.8
    figures = remote.figures()
    assert (figures["ttft_shm_r64_s"], figures["read_shm_r64_s"]) == (0.3, 0.03)
    assert (figures["ttft_resident_r64_s"], figures["read_store_r8_s"]) == (0.1, 0.06)
    assert figures["step_quiet_p99_s"] == pytest.approx(0.197)
    assert "rank 64" in remote.tables()


def test_verbs_without_perftest_have_no_ratio() -> None:
    slabs = [Slab(1, 80.0, None, None)]
    assert verbs_ratio(slabs) is None
    assert verbs_figures(slabs) == {"verbs_1_mib_bytes_per_s": 80.0 * (1 << 20), "ib_read_bw_1_mib_bytes_per_s": None}


def test_only_steps_within_one_block_are_counted() -> None:
    times_s = [0.0, 1.0, 1.5, 2.5, 4.0, 4.25]
    assert gaps_within(times_s, [(1.0, 2.0), (2.4, 4.5)]) == [0.5, 1.5, 0.25]


def test_a_readers_pool_is_smaller_than_the_loaded_adapters() -> None:
    for plan in (FULL, QUICK):
        sizes = {rank: extent_bytes(rank * 610_560) for rank in set(plan.ranks)}
        for rank, size_bytes in sizes.items():
            assert plan.ranks.count(rank) * size_bytes > READER_POOL_BYTES, f"those of rank {rank} would stay"
    assert len(FULL.ranks) - 1 == 50


def test_the_table_has_a_cell_for_every_column() -> None:
    found = {size: measured() for size in transfer.SIZES_MIB}
    assert {len(row) for row in transfer.rows(found)} == {1 + len(transfer.WAYS) + len(transfer.PAIRS)}
    assert len(transfer.GOALS) == len(transfer.PAIRS)


@pytest.mark.parametrize("size", [1, 100_000])
def test_a_plain_socket_fills_the_whole_buffer(size: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:

        def send() -> None:
            place, length = theirs.recv(8), theirs.recv(8)
            theirs.sendall(bytes([int.from_bytes(place, "big")]) * int.from_bytes(length, "big"))

        sending = threading.Thread(target=send)
        sending.start()
        into = np.zeros(size, np.uint8)
        transfer.receive(ours, into, 7)
        sending.join()
    assert (into == 7).all()
