"""What scripts/bench transfer makes of its rounds."""

import socket
import threading

import numpy as np
import pytest
import transfer

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


def test_ways_are_compared_within_a_round() -> None:
    slowed_down = measured(shm=[2.0, 20.0, 4.0], memcpy=[1.0, 10.0, 4.0])
    assert slowed_down.over("shm", "memcpy") == 0.5
    assert slowed_down.bytes_per_s()["shm"] == 25.0


def test_the_ratios_are_those_of_the_size_that_does_worst_and_the_rest_is_null() -> None:
    found = {1: measured(shm=[4.0] * 3, tcp=[1.0] * 3), 4: measured(shm=[2.0] * 3, tcp=[8.0] * 3)}
    ratios = transfer.ratios(found)
    assert set(ratios) == RATIO_KEYS
    assert {key: value for key, value in ratios.items() if value is not None} == {
        "shm_vs_memcpy": 0.25,
        "tcp_vs_raw": 0.125,
    }


def test_the_table_has_a_cell_for_every_column() -> None:
    found = {size: measured() for size in transfer.SIZES_MIB}
    assert {len(row) for row in transfer.rows(found)} == {1 + len(transfer.WAYS) + len(transfer.PAIRS)}
    assert len(transfer.GOALS) == len(transfer.PAIRS)


@pytest.mark.parametrize("size", [1, 100_000])
def test_a_plain_socket_fills_the_whole_buffer(size: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:

        def send() -> None:
            theirs.sendall(bytes([7]) * int.from_bytes(theirs.recv(8), "big"))

        sending = threading.Thread(target=send)
        sending.start()
        into = np.zeros(size, np.uint8)
        transfer.receive(ours, into)
        sending.join()
    assert (into == 7).all()
