"""What scripts/restart does when a process does not stop or does not come back. Other programs play the cluster."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loraserve.config import Config, load_config
from loraserve.supervisor import rolling
from loraserve.supervisor.rolling import RestartError, RollingRestart
from loraserve.supervisor.state import RunState, write_state

IGNORES_SIGTERM = "import signal; signal.signal(15, signal.SIG_IGN); print(1, flush=True); input() # loraserve"
ENDS = "print(1, flush=True); input() # loraserve"


@contextmanager
def program(code: str) -> Iterator["subprocess.Popen[bytes]"]:
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        yield child
    finally:
        child.kill()
        child.communicate()


def configured(run_dir: Path) -> Config:
    return load_config(environ={}, overrides=[f"cluster.run_dir={run_dir}", "cluster.engines=2"])


def restart(run_dir: Path, supervisor: int, name: str, pid: int) -> list[str]:
    """Restart the process with a timeout of 0.5 s. Returns what was printed. Raises RestartError."""
    write_state(run_dir, RunState(pid=supervisor, url="", log_dir="/logs", model="", processes={name: pid}))
    said: list[str] = []
    try:
        asyncio.run(RollingRestart(configured(run_dir), 0.5, False, said.append).run([name]))
    except RestartError as error:
        said.append(f"error: {error}")
    return said


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    return folder


def test_a_process_that_does_not_come_back_is_named_with_its_log(run_dir: Path) -> None:
    with program(ENDS) as supervisor, program(ENDS) as router:
        said = restart(run_dir, supervisor.pid, "router", router.pid)
        assert router.wait(5) == -15
    assert said == [
        f"router: stopping pid {router.pid}",
        "error: router is not ready after 0.5 s; see /logs/router.log",
    ]


def test_a_process_that_ignores_sigterm_is_killed(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rolling, "LEAST_STOP_TIMEOUT_S", 0.3)
    monkeypatch.setattr(rolling, "STOP_MARGIN_S", -100.0)
    with program(ENDS) as supervisor, program(IGNORES_SIGTERM) as store:
        said = restart(run_dir, supervisor.pid, "store", store.pid)
        assert store.wait(5) == -9
    assert said[1] == "store: did not end within 0.3 s of SIGTERM, killing it"


def test_an_engine_is_not_stopped_while_no_other_engine_is_ready(run_dir: Path) -> None:
    with program(ENDS) as supervisor, program(ENDS) as engine:
        said = restart(run_dir, supervisor.pid, "engine-1", engine.pid)
        assert engine.poll() is None
    assert said == [
        "error: engine-1: waiting for another ready engine took more than 0.5 s; scripts/status shows the processes"
    ]


def test_the_end_of_the_cluster_ends_the_restart(run_dir: Path) -> None:
    with program(ENDS) as supervisor:
        supervisor.kill()
        supervisor.wait()
        assert restart(run_dir, supervisor.pid, "router", 1) == [
            "error: the cluster has stopped meanwhile; start it with scripts/up"
        ]
