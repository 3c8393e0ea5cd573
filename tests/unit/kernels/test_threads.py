"""Each part of a call is computed once, by any thread, and no call waits for a thread that cannot run."""

import ctypes
import threading
import time

import numpy as np
import pytest

from loraserve.kernels.cpu.compiled import Kernel
from loraserve.kernels.cpu.operands import OperandBlock, floats, fractions, int64s, integers, reader, take_part
from loraserve.kernels.cpu.threads import Team


class CountCall(OperandBlock):
    """Operands of ``_count_parts``; ``work`` is the number of rounds for each part."""

    __slots__ = ()
    _fields_ = integers("parts", "counts", "work")


class StoreFloatCall(OperandBlock):
    """Operands of ``_store_float``."""

    __slots__ = ()
    _fields_ = (*integers("out"), *fractions("value"), *integers("after"))


_count_operands, _store_operands = reader(CountCall), reader(StoreFloatCall)


def _count_parts(operands):  # type: ignore[no-untyped-def]
    """Add 1 to element p for every part p, after some work."""
    o = _count_operands(operands)
    counts = int64s(o.counts, o.parts)
    part = take_part(operands)
    while part < o.parts:
        noise = np.uint64(part)
        for _ in range(o.work):
            noise ^= noise << np.uint64(13)
            noise ^= noise >> np.uint64(7)
        counts[part] += 1 + (np.int64(noise) == -1)
        part = take_part(operands)


def _store_float(operands):  # type: ignore[no-untyped-def]
    o = _store_operands(operands)
    floats(o.out, 1)[0] = o.value * np.float32(o.after)


COUNT_PARTS, STORE_FLOAT = Kernel(_count_parts), Kernel(_store_float)


def count(team: Team, threads: int, parts: int, work: int = 0) -> list[int]:
    counts = np.zeros(parts, np.int64)
    team.run(COUNT_PARTS, CountCall(parts=parts, counts=counts.ctypes.data, work=work), threads)
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


def test_a_call_does_not_wait_for_a_helper_that_never_wakes() -> None:
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


def test_python_threads_run_while_a_kernel_computes(team: Team) -> None:
    """The interpreter lock is released: this thread runs during a call of another."""
    count(team, 1, 1)
    caller = threading.Thread(target=count, args=(team, 1, 1, 200_000_000))
    caller.start()
    ticks = 0
    while caller.is_alive():
        time.sleep(0.002)
        ticks += 1
    assert ticks > 5


@pytest.mark.parametrize("value", [0.125, -3.5e-20, 1e-6, 7.0])
def test_float_operands_and_those_after_them_arrive(value: float) -> None:
    out = np.zeros(1, np.float32)
    STORE_FLOAT.call(ctypes.byref(StoreFloatCall(out=out.ctypes.data, value=value, after=2)))
    assert out[0] == np.float32(value) * np.float32(2)


def test_misspelt_operands_are_refused() -> None:
    with pytest.raises(AttributeError):
        CountCall(part=1)
