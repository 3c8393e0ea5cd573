"""Services as real processes: signals, exit statuses, output, and the end of their supervisor."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loraserve.testing.local_cluster import free_port

TIMEOUT_S = 20.0

SCRIPT = """
import asyncio, os, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from loraserve import process
from loraserve.errors import ConfigError
from loraserve.messages import Ping
from loraserve.service import Service
from loraserve.threads import run_in_thread

mode = os.environ.get("MODE", "")
process.EXIT_GRACE_S = 0.3


class Worker(Service):
    inbox = Ping

    async def start(self, stack):
        if mode == "bad_start":
            raise ConfigError("model.path is empty; name a directory")
        if mode == "slow_start":
            await asyncio.sleep(60)
        if mode == "hanging_thread":
            asyncio.get_running_loop().run_in_executor(None, time.sleep, 60)
        if mode == "hanging_close":
            # Like a lock that a hanging thread holds.
            stack.callback(threading.Event().wait)
            self.drain_timeout_s = 0.3

    def loops(self):
        return [self.loop(), self.wait_for_thread()]

    async def wait_for_thread(self):
        if mode == "hanging_task":
            self.drain_timeout_s = 0.3
            await run_in_thread(ThreadPoolExecutor(1), lambda: time.sleep(60))

    async def loop(self):
        if mode == "crash":
            await asyncio.sleep(0.1)
            {}["missing"]

    async def drain(self):
        if mode == "slow_drain":
            await asyncio.sleep(60)


raise SystemExit(process.main(Worker, "worker-0"))
"""


class Runner:
    """Starts copies of the script, and ends those that a failed test has left running."""

    def __init__(self, folder: Path) -> None:
        self.run_dir = folder / "run"
        self.script = folder / "worker.py"
        self.script.write_text(SCRIPT)
        self.config = folder / "cluster.toml"
        self.config.write_text(f'[cluster]\nrun_dir = "{self.run_dir}"\n')
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, *flags: str, mode: str = "") -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(
            [sys.executable, str(self.script), "--config", str(self.config), *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # A buffer would hold lines that select() does not know of.
            bufsize=0,
            env={**os.environ, "MODE": mode},
        )
        self._started.append(process)
        return process

    def ping(self, name: str, *flags: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "loraserve.ping", name, "--config", str(self.config), *flags]
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)

    def end_all(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.communicate()


@pytest.fixture
def runner() -> Iterator[Runner]:
    with tempfile.TemporaryDirectory(prefix="ls-") as folder:
        runner = Runner(Path(folder))
        yield runner
        runner.end_all()


def lines_until(process: "subprocess.Popen[bytes]", event: str) -> list[dict[str, Any]]:
    """Return the log lines of the process up to the first with this event."""
    assert process.stderr is not None
    lines: list[dict[str, Any]] = []
    deadline_s = time.monotonic() + TIMEOUT_S
    while not lines or lines[-1]["event"] != event:
        ready, _, _ = select.select([process.stderr], [], [], max(0.0, deadline_s - time.monotonic()))
        assert ready, f"no {event} in {TIMEOUT_S} s after {lines}"
        lines.append(json.loads(process.stderr.readline()))
    return lines


def end(process: "subprocess.Popen[bytes]") -> tuple[int, list[dict[str, Any]]]:
    """Return the exit status of the process and the rest of its log."""
    status, log = outcome(process)
    return status, [json.loads(line) for line in log.splitlines()]


def outcome(process: "subprocess.Popen[bytes]") -> tuple[int, str]:
    """Return the exit status of the process and the rest of its standard error."""
    _, errors = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, errors.decode()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_stops_the_process(runner: Runner, number: signal.Signals) -> None:
    process = runner.start()
    lines = lines_until(process, "started")
    assert {line["process"] for line in lines} == {"worker-0"}
    process.send_signal(number)
    status, log = end(process)
    assert status == 0
    assert [line["event"] for line in log] == ["signal", "draining", "stopped"]
    assert os.listdir(runner.run_dir) == ["worker-0.lock"]


def test_a_signal_stops_a_starting_process(runner: Runner) -> None:
    process = runner.start(mode="slow_start")
    lines_until(process, "starting")
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 0


def test_a_second_signal_ends_the_process_at_once(runner: Runner) -> None:
    process = runner.start(mode="slow_drain")
    lines_until(process, "started")
    process.send_signal(signal.SIGINT)
    lines_until(process, "draining")
    process.send_signal(signal.SIGTERM)
    status, log = end(process)
    assert status == 128 + signal.SIGTERM
    assert log[-1]["event"] == "signal_again"


def test_a_crash_is_logged_with_its_traceback_and_gives_exit_status_1(runner: Runner) -> None:
    status, log = end(runner.start(mode="crash"))
    assert status == 1
    assert log[-1]["event"] == "crashed"
    assert "KeyError: 'missing'" in log[-1]["exception"]
    assert "in loop" in log[-1]["exception"]


@pytest.mark.parametrize("mode", ["hanging_thread", "hanging_close", "hanging_task"])
def test_a_hanging_thread_does_not_keep_the_process_alive(runner: Runner, mode: str) -> None:
    process = runner.start(mode=mode)
    lines_until(process, "started")
    process.send_signal(signal.SIGTERM)
    started_s = time.monotonic()
    assert end(process)[0] == 0
    assert time.monotonic() - started_s < 10


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--set", "engine.pool=1"], "Object contains unknown field `pool`"),
        (["--config", "/nonexistent.toml"], "No such file"),
        (["--set", "cluster.run_dir=/tmp/" + "x" * 120], "set cluster.run_dir to a shorter folder"),
        (["--name", "Worker 1"], "process name 'Worker 1'"),
    ],
)
def test_an_invalid_configuration_gives_one_line_and_exit_status_2(runner: Runner, flags: list[str], text: str) -> None:
    process = runner.start(*flags)
    status, errors = outcome(process)
    assert status == 2
    assert text in errors
    assert errors.count("\n") == 1


def test_a_configuration_error_during_the_start_is_the_last_line(runner: Runner) -> None:
    process = runner.start(mode="bad_start")
    status, errors = outcome(process)
    assert status == 2
    assert errors.splitlines()[-1] == "worker-0: model.path is empty; name a directory"
    assert "Traceback" not in errors


def test_a_second_process_with_the_same_name_is_refused(runner: Runner) -> None:
    first = runner.start()
    lines_until(first, "started")
    second = runner.start()
    status, errors = outcome(second)
    assert status == 2
    assert f"a process named worker-0 already runs in {runner.run_dir} (pid {first.pid})" in errors
    assert runner.ping("worker-0").returncode == 0


def test_a_process_that_listens_on_tcp_warns_that_its_bus_is_unprotected(runner: Runner) -> None:
    inbox, publications = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
    process = runner.start("--set", f"bus.connect={inbox}", "--set", f"bus.connect_pub={publications}")
    warning = lines_until(process, "started")[0]
    assert (warning["event"], warning["level"], warning["process"]) == ("bus_unprotected", "warning", "worker-0")
    assert warning["addresses"] == [inbox, publications]
    assert "can command the cluster" in warning["consequence"]
    assert "bus.bind" in warning["remedy"]
    private = runner.start("--name", "worker-1")
    assert "bus_unprotected" not in {line["event"] for line in lines_until(private, "started")}


def test_logs_are_written_to_a_file_in_the_configured_folder(runner: Runner, tmp_path: Path) -> None:
    process = runner.start("--set", f"cluster.log_dir={tmp_path}/logs", mode="crash")
    assert outcome(process) == (1, "")
    log = [json.loads(line) for line in (tmp_path / "logs" / "worker-0.log").read_text().splitlines()]
    assert [line["event"] for line in log] == ["starting", "started", "stopped", "crashed"]


@pytest.mark.parametrize("direct", [True, False], ids=["child", "grandchild"])
def test_the_process_ends_when_its_supervisor_is_killed(runner: Runner, direct: bool) -> None:
    # The supervisor starts the process itself, or through a shell that keeps running.
    command = [sys.executable, str(runner.script), "--config", str(runner.config), "--parent-pid"]
    between = "" if direct else "['sh', '-c', '\"$@\"; true', 'sh'] + "
    supervisor = subprocess.Popen(
        [sys.executable, "-c", f"import os, subprocess; subprocess.run({between}{command!r} + [str(os.getpid())])"],
        stderr=subprocess.PIPE,
        bufsize=0,
    )
    try:
        lines_until(supervisor, "started")
        supervisor.kill()
        supervisor.wait()
        # Standard error is closed when the last process that inherited it has ended.
        _, rest = supervisor.communicate(timeout=TIMEOUT_S)
        assert json.loads(rest.splitlines()[-1])["event"] == "stopped"
    finally:
        if supervisor.poll() is None:
            supervisor.kill()


def test_the_process_runs_while_its_supervisor_lives(runner: Runner) -> None:
    process = runner.start("--parent-pid", str(os.getpid()))
    lines_until(process, "started")
    time.sleep(1.2)
    assert process.poll() is None


def test_ping_distinguishes_ready_starting_and_absent_processes(runner: Runner) -> None:
    ready, starting = runner.start(), runner.start("--name", "worker-1", mode="slow_start")
    lines_until(ready, "started")
    lines_until(starting, "starting")
    pings = {name: runner.ping(name, "--timeout-s", "1") for name in ("worker-0", "worker-1", "worker-2")}
    assert {name: ping.returncode for name, ping in pings.items()} == {"worker-0": 0, "worker-1": 1, "worker-2": 1}
    assert pings["worker-0"].stdout == "worker-0: READY\n"
    assert pings["worker-1"].stdout == "worker-1: STARTING\n"
    assert pings["worker-2"].stderr == "worker-2: worker-2 did not answer Ping in 1 s\n"
    assert runner.ping("worker-0", "--set", "bus.connect=udp://x").returncode == 2
