"""Starting, refusing to start, and stopping a cluster without leaving anything behind."""

import asyncio
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from loraserve.model_shape import read_model_config, shape_from_config
from loraserve.supervisor.state import is_ours, read_state
from loraserve.testing.local_cluster import LocalCluster, chat, free_port
from loraserve.testing.tiny_model import write_peft_adapter, write_tiny_model
from loraserve.testing.tiny_tokenizer import write_tiny_tokenizer


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make_tiny(tmp_path, "qwen3")


def make_tiny(folder: Path, family: str) -> Path:
    model = folder / f"tiny-{family}"
    write_tiny_model(model, family, vocab_size=512)
    write_tiny_tokenizer(model)
    return model


def test_a_local_model_is_served_and_nothing_is_left_behind(tiny: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    write_peft_adapter(adapter, shape_from_config(read_model_config(tiny)), 4)
    running = LocalCluster(tmp_path / "data", "--model", str(tiny), "--engines", "1", adapters={"mine": adapter})
    with running:
        pids = running.pids()
        assert set(pids) == {"supervisor", "store", "planner", "monitor", "router", "engine-0", "gateway-0"}

        async def ask() -> list[str]:
            async with running.session() as http:
                return [(await chat(http, name, "hi", max_tokens=8)).text for name in (tiny.name, "mine")]

        base, adapted = asyncio.run(ask())
        assert base != adapted
        again = subprocess.run(running.command("up", "--model", str(tiny)), capture_output=True, text=True)
        assert again.returncode == 1
        assert "already runs" in again.stderr
    assert not [name for name, pid in pids.items() if is_ours(pid)]
    assert not list((tmp_path / "data" / "run").glob("*"))


def test_children_end_with_a_killed_supervisor(tiny: Path, tmp_path: Path) -> None:
    with LocalCluster(tmp_path / "data", "--model", str(tiny), "--engines", "1") as running:
        pids = running.pids()
        running.kill("supervisor")
        for _ in range(100):
            left = [name for name, pid in pids.items() if is_ours(pid)]
            if not left:
                break
            asyncio.run(asyncio.sleep(0.1))
        assert not left


def test_a_port_chosen_by_the_system_is_announced_and_served(tiny: Path, tmp_path: Path) -> None:
    with LocalCluster(tmp_path / "data", "--model", str(tiny), "--engines", "1", "--port", "0") as running:
        state = read_state(tmp_path / "data" / "run")
        assert state is not None
        with urllib.request.urlopen(f"{state.url}/health", timeout=10) as response:
            assert response.status == 200
        assert f"curl -s {state.url}/v1/" in (running.data_dir / "logs" / "up.log").read_text()


def test_a_cluster_that_still_prepares_its_model_is_seen_by_others_and_stopped(tmp_path: Path) -> None:
    cluster = LocalCluster(tmp_path / "data")
    run_dir = cluster.data_dir / "run"
    with cluster.starting("--port", str(cluster.port)) as first:
        wait_for(lambda: (run_dir / "cluster.json").exists())
        second = subprocess.run(cluster.command("up", "--port", str(free_port())), capture_output=True, text=True)
        assert (second.returncode, "already runs" in second.stderr) == (1, True)
        assert first.poll() is None
        cluster.down()
        assert first.wait(20) == 130
    assert not list(run_dir.glob("*"))


def test_ctrl_c_while_up_waits_stops_what_was_started(tiny: Path, tmp_path: Path) -> None:
    cluster = LocalCluster(tmp_path / "data")
    run_dir = cluster.data_dir / "run"
    with cluster.starting("--detach", "--port", str(cluster.port), "--model", str(tiny)) as waiting:
        wait_for(lambda: (state := read_state(run_dir)) is not None and len(state.processes) > 3)
        pids = cluster.pids()
        waiting.send_signal(signal.SIGINT)
        assert waiting.wait(30) == 130
        assert not [name for name, pid in pids.items() if is_ours(pid)]
    assert not list(run_dir.glob("*"))


STARTER = """
import os, signal, sys
from pathlib import Path
from loraserve.testing.local_cluster import LocalCluster

cluster = LocalCluster(Path(sys.argv[1]), "--model", sys.argv[2], "--engines", "1")
cluster.up()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_cluster_ends_with_the_killed_test_that_started_it(tiny: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    done = subprocess.run([sys.executable, "-c", STARTER, str(data), str(tiny)], timeout=120)
    assert done.returncode == -signal.SIGKILL
    state = read_state(data / "run")
    try:
        assert state is not None
        pids = [state.pid, *state.processes.values()]
        wait_for(lambda: not any(is_ours(pid) for pid in pids))
        assert not list((data / "run").glob("*"))
    finally:
        LocalCluster(data).down()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_a_folder_that_others_may_enter_is_refused_and_left_alone(tiny: Path, tmp_path: Path) -> None:
    chosen = tmp_path / "mine"
    chosen.mkdir(mode=0o755)
    (chosen / "config.toml").write_text("kept")
    cluster = LocalCluster(tmp_path / "data")
    flags = ("--model", str(tiny), "--set", f"cluster.run_dir={chosen}")
    done = subprocess.run(cluster.command("up", *flags), capture_output=True, text=True, timeout=60)
    assert (done.returncode, "chmod 700" in done.stderr) == (1, True)
    assert [path.read_text() for path in chosen.iterdir()] == ["kept"]


@pytest.mark.parametrize("flags", [("--port", "BUSY"), ("--model", "/nowhere"), ("--set", "engine.pools=1")])
def test_a_start_that_cannot_work_fails_with_one_line(flags: tuple[str, str], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        value = str(taken.getsockname()[1]) if flags[1] == "BUSY" else flags[1]
        cluster = LocalCluster(tmp_path / "data")
        done = subprocess.run(cluster.command("up", flags[0], value), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
    assert any(word in lines[-1] for word in ("--port", "--model", "config.py"))
