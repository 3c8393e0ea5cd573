"""Which processes a rolling restart takes, and in which order."""

import subprocess
import sys
from pathlib import Path

import pytest

from loraserve.config import load_config
from loraserve.errors import ConfigError
from loraserve.supervisor.rolling import select_processes

TWO = load_config(environ={}, overrides=["cluster.engines=2", "cluster.gateways=2"])
ONE = load_config(environ={}, overrides=["cluster.engines=1"])


def test_all_processes_are_restarted_in_starting_order() -> None:
    names = ["store", "planner", "monitor", "router", "engine-0", "engine-1", "gateway-0", "gateway-1"]
    assert select_processes(TWO, [], force=False) == names
    assert select_processes(TWO, ["gateway-1", "router", "gateway-1"], force=False) == ["router", "gateway-1"]


def test_an_unknown_process_is_named_with_those_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"no process 'engine-7'.* store, .*engine-1, gateway-0"):
        select_processes(TWO, ["engine-7"], force=True)


def test_the_only_engine_is_restarted_by_force_alone() -> None:
    for chosen in ([], ["engine-0"], ["router", "engine-0"]):
        with pytest.raises(ConfigError, match=r"engine-0 is the only engine.*--force.*--engines 2"):
            select_processes(ONE, chosen, force=False)
    assert select_processes(ONE, ["engine-0"], force=True) == ["engine-0"]
    assert select_processes(ONE, ["router"], force=False) == ["router"]


def test_without_a_cluster_the_command_fails_with_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loraserve.cluster", "restart", "--data", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: no cluster runs in")
    assert "scripts/up" in done.stderr
    assert done.stderr.count("\n") == 1
