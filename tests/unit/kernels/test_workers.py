"""Every part of a call is done once, by whom ever; nobody waits for a thread that cannot run."""

import ctypes
import threading
import time

import numpy as np
import pytest

from loraserve.kernels.compiled import Kernel
from loraserve.kernels.memory import as_float, float_bits, floats, int64s, take_part
from loraserve.kernels.workers import Team


def _count_parts(operands):  # type: ignore[no-untyped-def]
    """Adds 1 to element p for every part p, after some work."""
    values = int64s(operands, 4)
    parts, counts = values[1], int64s(values[2], values[1])
    part = take_part(operands)
    while part < parts:
        noise = np.uint64(part)
        for _ in range(values[3]):
            noise ^= noise << np.uint64(13)
            noise ^= noise >> np.uint64(7)
        counts[part] += 1 + (np.int64(noise) == -1)
        part = take_part(operands)


def _store_float(operands):  # type: ignore[no-untyped-def]
    values = int64s(operands, 3)
    floats(values[1], 1)[0] = as_float(values[2])


COUNT_PARTS, STORE_FLOAT = Kernel(_count_parts), Kernel(_store_float)


def count(team: Team, threads: int, parts: int, work: int = 0) -> list[int]:
    counts = np.zeros(parts, np.int64)
    team.run(COUNT_PARTS, (ctypes.c_int64 * 4)(0, parts, counts.ctypes.data, work), threads)
    return counts.tolist()


@pytest.fixture(scope="module")
def team() -> Team:
    return Team()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_part_once(team: Team, threads: int) -> None:
    for turn in range(300):
        parts = turn % 7
        assert count(team, threads, parts, work=turn) == [1] * parts


def test_several_callers_at_once(team: Team) -> None:
    wrong: list[list[int]] = []

    def call() -> None:
        for _ in range(200):
            counts = count(team, 3, 20, work=500)
            if counts != [1] * 20:
                wrong.append(counts)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def test_nobody_waits_for_a_helper_that_never_wakes() -> None:
    alone = Team()
    alone._helpers = 3  # as if they had been started and got no processor
    for _ in range(50):
        assert count(alone, 4, 10, work=100) == [1] * 10


def test_helpers_sleep_between_calls(team: Team) -> None:
    count(team, 4, 10)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1


def test_python_runs_on_while_a_kernel_computes(team: Team) -> None:
    """The interpreter's lock is free: this thread's clock ticks on during a call of another."""
    count(team, 1, 1)
    caller = threading.Thread(target=count, args=(team, 1, 1, 200_000_000))
    caller.start()
    ticks = 0
    while caller.is_alive():
        time.sleep(0.002)
        ticks += 1
    assert ticks > 5


@pytest.mark.parametrize("value", [0.125, -3.5e-20, 1e-6, 7.0])
def test_fractions_pass_as_integers(value: float) -> None:
    out = np.zeros(1, np.float32)
    STORE_FLOAT.call((ctypes.c_int64 * 3)(0, out.ctypes.data, float_bits(value)))
    assert out[0] == np.float32(value)
