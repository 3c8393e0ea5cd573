"""build_once: an incomplete folder is never used."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loraserve.demo.paths import build_once, default_data_dir, is_current
from loraserve.errors import ConfigError

SOURCE = {"version": 1}


def quiet(line: str) -> None:
    """Ignore progress messages."""


def write_content(folder: Path) -> None:
    (folder / "content").write_text("whole")


def test_a_second_call_builds_nothing(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    calls = []

    def build(folder: Path) -> None:
        calls.append(folder)
        write_content(folder)

    assert build_once(target, SOURCE, build, quiet) == target
    assert build_once(target, SOURCE, build, quiet) == target
    assert len(calls) == 1
    assert (target / "content").read_text() == "whole"


def test_another_source_or_a_damaged_file_is_built_again(tmp_path: Path) -> None:
    target = tmp_path / "target"
    build_once(target, SOURCE, write_content, quiet)
    assert not is_current(target, {"version": 2})
    (target / "content").write_text("cut")
    assert not is_current(target, SOURCE)
    (target / "stale").write_text("of the older build")
    build_once(target, SOURCE, write_content, quiet)
    assert (target / "content").read_text() == "whole"
    assert not (target / "stale").exists()
    (target / "content").unlink()
    assert not is_current(target, SOURCE)


@pytest.mark.parametrize("marker", ["", "[]", "null", '{"source": {"version": 1}}', '{"source": {}, "file_bytes": 3}'])
def test_a_broken_marker_is_ignored(tmp_path: Path, marker: str) -> None:
    (tmp_path / "source.json").write_text(marker)
    assert not is_current(tmp_path, SOURCE)


@pytest.mark.parametrize("failure", [RuntimeError("build"), KeyboardInterrupt()])
def test_a_failed_build_leaves_nothing_and_keeps_the_old(tmp_path: Path, failure: BaseException) -> None:
    def fail(folder: Path) -> None:
        (folder / "content").write_text("half")
        raise failure

    target = tmp_path / "target"
    with pytest.raises(type(failure)):
        build_once(target, SOURCE, fail, quiet)
    assert [path.name for path in tmp_path.iterdir()] == [".target.lock"]
    build_once(target, SOURCE, write_content, quiet)
    with pytest.raises(type(failure)):
        build_once(target, {"version": 2}, fail, quiet)
    assert (target / "content").read_text() == "whole"


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "disk is full; free some space or set LORASERVE_DATA"),
        (errno.EACCES, "no permission to write"),
        (errno.EROFS, "read-only"),
        (errno.EIO, "check the folder"),
    ],
)
def test_a_disk_error_is_reported_with_a_remedy(tmp_path: Path, number: int, remedy: str) -> None:
    def refuse(folder: Path) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(ConfigError, match=remedy):
        build_once(tmp_path / "target", SOURCE, refuse, quiet)


def test_a_file_where_the_folder_should_be_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="LORASERVE_DATA"):
        build_once(tmp_path / "file" / "target", SOURCE, write_content, quiet)


SLOW_BUILD = """
import sys, time
from pathlib import Path
from loraserve.demo.paths import build_once
def build(folder):
    (folder / "content").write_text("half")
    print("half", flush=True)
    time.sleep(float(sys.argv[2]))
    (folder / "content").write_text("whole")
build_once(Path(sys.argv[1]), {"version": 1}, build, print)
"""


def slow_build(target: Path, seconds: float) -> subprocess.Popen[str]:
    """Start another process that is building ``target``."""
    command = [sys.executable, "-c", SLOW_BUILD, str(target), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    return process


def test_the_files_of_a_killed_build_are_removed_by_the_next(tmp_path: Path) -> None:
    target = tmp_path / "target"
    process = slow_build(target, 60)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not target.exists()
    assert (tmp_path / ".target.partial" / "content").read_text() == "half"
    build_once(target, SOURCE, write_content, quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".target.lock", "target"]


def test_a_second_process_waits_and_uses_the_first_ones_folder(tmp_path: Path) -> None:
    target = tmp_path / "target"
    process = slow_build(target, 0.5)
    said: list[str] = []

    def build(folder: Path) -> None:
        raise AssertionError("built twice")

    started = time.monotonic()
    build_once(target, SOURCE, build, said.append)
    assert time.monotonic() - started > 0.1
    assert said == ["waiting for another process that builds the same folder"]
    assert (target / "content").read_text() == "whole"
    process.communicate()


def test_the_data_dir_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LORASERVE_DATA", str(tmp_path / "chosen"))
    assert default_data_dir() == tmp_path / "chosen"
    monkeypatch.delenv("LORASERVE_DATA")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    assert default_data_dir() == tmp_path / "xdg" / "loraserve"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert default_data_dir() == tmp_path / ".local" / "share" / "loraserve"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert default_data_dir() == tmp_path / "Library" / "Application Support" / "loraserve"
