"""Populating the pages of a pool before a load needs them, while memory is available."""

import os
import threading
from typing import Any

import pytest

from loraserve.engine.loading import memory as module
from loraserve.engine.loading.memory import IDLE_PRIORITY, LEAST_AVAILABLE, populate
from loraserve.transfer.shm import SharedMemory, is_supported

pytestmark = pytest.mark.skipif(not is_supported(), reason="needs memfd, which tells how many pages it has")
LENGTH_BYTES = 5 * (1 << 20)
LONG_S = 60.0


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> SharedMemory:
    monkeypatch.setattr(module, "POPULATE_PIECE_BYTES", 2 << 20)
    monkeypatch.setattr(module, "available_memory_share", lambda: 1.0)
    return SharedMemory(LENGTH_BYTES)


def taken_bytes(memory: SharedMemory) -> int:
    descriptor = memory.export()
    try:
        return os.fstat(descriptor).st_blocks * 512
    finally:
        os.close(descriptor)


def test_all_pages_are_populated_and_keep_their_content(memory: SharedMemory) -> None:
    memory.view[3 << 20 : (3 << 20) + 4] = b"here"
    assert taken_bytes(memory) < LENGTH_BYTES
    populate(memory.view).join(LONG_S)
    assert taken_bytes(memory) == LENGTH_BYTES
    assert memory.view[3 << 20 : (3 << 20) + 4] == b"here"
    assert not any(memory.view[: 1 << 20])


def test_populating_stops_when_memory_is_short(
    memory: SharedMemory, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    shares = iter([LEAST_AVAILABLE, LEAST_AVAILABLE - 0.01])
    monkeypatch.setattr(module, "available_memory_share", lambda: next(shares))
    populate(memory.view).join(LONG_S)
    assert taken_bytes(memory) == 2 << 20
    assert "little memory is available" in capfd.readouterr().out


def test_a_kernel_without_populate_leaves_pages_to_the_first_write(
    memory: SharedMemory, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(module, "POPULATE_WRITE", 9999)
    populate(memory.view).join(LONG_S)
    assert taken_bytes(memory) == 0
    assert "Invalid argument" in capfd.readouterr().out
    memory.view[0] = 1


def test_populating_has_the_lowest_priority(memory: SharedMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    priorities: list[int] = []
    own = os.getpriority(os.PRIO_PROCESS, 0)

    def noted() -> float:
        priorities.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return 1.0

    monkeypatch.setattr(module, "available_memory_share", noted)
    populate(memory.view).join(LONG_S)
    assert priorities == [IDLE_PRIORITY] * 3
    assert os.getpriority(os.PRIO_PROCESS, 0) == own, "this thread goes on as before"


def test_outside_linux_nothing_is_populated_and_no_priority_changes(
    memory: SharedMemory, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    changed: list[tuple[int, ...]] = []
    monkeypatch.setattr(module.sys, "platform", "darwin")
    monkeypatch.setattr(module.os, "setpriority", lambda *arguments: changed.append(arguments))
    populate(memory.view).join(LONG_S)
    assert changed == []
    assert taken_bytes(memory) == 0
    assert "darwin cannot populate pages" in capfd.readouterr().out
