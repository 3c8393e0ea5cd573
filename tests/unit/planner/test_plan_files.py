"""The plan on disk is complete whatever happens to the process or the disk."""

import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loraserve.messages import Placement, Plan
from loraserve.planner.plan_files import PLAN_NAME, PlanFiles

WRITER = """
import sys
from pathlib import Path
from loraserve.messages import Placement, Plan
from loraserve.planner.plan_files import PlanFiles

files, epoch = PlanFiles(Path(sys.argv[1])), int(sys.argv[2])
while True:
    epoch += 1
    copies = tuple(Placement(version=str(n), name=str(epoch), engine="e0", share=1.0) for n in range(2000))
    files.write_plan(Plan(epoch=epoch, created_unix_s=1.0, placements=copies))
    print(epoch, flush=True)
"""


def plan(epoch: int, copies: int = 2) -> Plan:
    placements = (Placement(version=f"v{n}", name="ünïcode", engine="e0", share=0.1) for n in range(copies))
    return Plan(epoch=epoch, created_unix_s=1.7e9 + epoch, placements=tuple(placements))


@contextmanager
def small_disk(limit_bytes: int) -> Iterator[None]:
    """Limit the size of files that this process can write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_there_is_no_plan_at_first(tmp_path: Path) -> None:
    assert PlanFiles(tmp_path / "planner").read_plan() is None


def test_the_last_plan_written_is_read_by_the_next_process(tmp_path: Path) -> None:
    for epoch in (1, 2):
        PlanFiles(tmp_path / "planner").write_plan(plan(epoch))
    assert PlanFiles(tmp_path / "planner").read_plan() == plan(2)
    assert [f.name for f in (tmp_path / "planner").iterdir()] == [PLAN_NAME]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a plan",
        b'{"type":"Plan","epoch":1,"created_unix_s":0,"placements":[{"version":"\xff',
        b'{"type":"Plan","epoch":1,"created_unix_s":0,"placements":[{"version":"\xff","name":"","engine":"","share":1}]}',
        b'{"type":"Abort","request_id":"r"}',
        b'{"type":"Plan","epoch":"one","created_unix_s":0,"placements":[]}',
        b'{"type":"Plan","more":' + b"[" * 100_000,
    ],
    ids=["empty", "text", "cut", "not utf-8", "another message", "wrong type", "nested without end"],
)
def test_an_unreadable_file_is_set_aside_and_the_next_plan_can_be_written(tmp_path: Path, content: bytes) -> None:
    (tmp_path / PLAN_NAME).write_bytes(content)
    files = PlanFiles(tmp_path)
    assert files.read_plan() is None
    (aside,) = tmp_path.iterdir()
    assert (aside.name != PLAN_NAME, aside.read_bytes()) == (True, content)
    files.write_plan(plan(1))
    assert files.read_plan() == plan(1)


def test_a_full_disk_raises_and_the_old_plan_stays(tmp_path: Path) -> None:
    files = PlanFiles(tmp_path)
    files.write_plan(plan(1))
    with small_disk(1000), pytest.raises(OSError, match="too large"):
        files.write_plan(plan(2, copies=100))
    assert files.read_plan() == plan(1)
    assert [f.name for f in tmp_path.iterdir()] == [PLAN_NAME], "what was half written is left behind"
    files.write_plan(plan(3))
    assert files.read_plan() == plan(3)


def test_a_plan_is_in_force_although_its_folder_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = PlanFiles(tmp_path)
    files.write_plan(plan(1))

    def refuses(folder: Path) -> None:
        raise OSError("Input/output error")

    monkeypatch.setattr("loraserve.planner.plan_files.sync_to_disk", refuses)
    files.write_plan(plan(2))
    assert files.read_plan() == plan(2), "the next process reads it, so it must be in force in this one"


def test_a_folder_that_cannot_be_created_raises(tmp_path: Path) -> None:
    (tmp_path / "planner").write_text("a file is in its place")
    with pytest.raises(OSError, match="planner"):
        PlanFiles(tmp_path / "planner").write_plan(plan(1))


def test_a_process_killed_while_it_writes_leaves_the_old_or_the_new_plan(tmp_path: Path) -> None:
    said = 0
    for delay_s in (0.0, 0.003, 0.011):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(said)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            said = int(writer.stdout.readline())
            time.sleep(delay_s)
            writer.kill()
            said = max([said, *(int(line) for line in writer.stdout.read().split())])
        left = PlanFiles(tmp_path).read_plan()
        assert left is not None
        assert left.epoch in (said, said + 1)
        assert {p.name for p in left.placements} == {str(left.epoch)}
        assert len(left.placements) == 2000
        said = left.epoch
