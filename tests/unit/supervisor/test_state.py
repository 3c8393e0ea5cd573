"""The state file and what `down` does with it."""

import signal
import subprocess
import sys
from pathlib import Path

from loraserve.supervisor.state import RunState, clear_run_dir, is_ours, read_state, stop_cluster, write_state


def state(pid: int, **processes: int) -> RunState:
    return RunState(pid=pid, url="http://127.0.0.1:1", log_dir="logs", model="m", processes=processes)


def sleeper(code: str = "import time; time.sleep(60)") -> subprocess.Popen[bytes]:
    child = subprocess.Popen(
        [sys.executable, "-c", f"print(1, flush=True); {code} # loraserve"], stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.readline()
    return child


def test_state_reads_back(tmp_path: Path) -> None:
    write_state(tmp_path, state(1, store=2))
    assert read_state(tmp_path) == state(1, store=2)


def test_a_truncated_state_file_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "cluster.json").write_bytes(b'{"pid": 1')
    assert read_state(tmp_path) is None


def test_a_reused_pid_is_not_ours() -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert not is_ours(child.pid)
    finally:
        child.kill()
        child.wait()


def test_clear_leaves_foreign_files_alone(tmp_path: Path) -> None:
    ours = ("cluster.json", ".cluster.json.17", "cluster.toml", "router.sock", "store.pub", "engine-0.lock", "up.lock")
    foreign = {"notes.txt", ".bashrc", "id_rsa.pub", "my.lock", "config.toml", "engine-x.sock"}
    for name in (*ours, *foreign):
        (tmp_path / name).touch()
    (tmp_path / ".git").mkdir()
    clear_run_dir(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == foreign | {".git"}


def test_stop_ends_children_of_a_dead_supervisor(tmp_path: Path) -> None:
    child = sleeper()
    stop_cluster(tmp_path, state(2**22 + 1, store=child.pid), timeout_s=5)
    assert child.wait(5) == -signal.SIGTERM


def test_stop_kills_processes_that_ignore_sigterm(tmp_path: Path) -> None:
    child = sleeper("import signal, time; signal.signal(15, signal.SIG_IGN); print(2, flush=True); time.sleep(60)")
    assert child.stdout is not None
    child.stdout.readline()
    stop_cluster(tmp_path, state(child.pid), timeout_s=0.5)
    assert child.wait(5) == -signal.SIGKILL
