"""Real processes that are interrupted while they import torch end in the same way as at any other time."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from loraserve.demo.model import CONVERSION, MODEL_NAME, PACKAGE
from loraserve.testing.local_cluster import free_port

TORCH = """
import importlib, os, signal, sys

# C++ code of torch aborts when its call of Python raises. This module does so in every run, torch only in some.
try:
    signal.raise_signal(int(os.environ["NUMBER"]))
except KeyboardInterrupt:
    os.abort()
sys.path.remove(os.path.dirname(__file__))
del sys.modules["torch"]
importlib.import_module("torch")
"""


def interrupt(folder: Path, number: signal.Signals, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a module that receives the signal during its import of torch."""
    shadow = folder / "shadow"
    shadow.mkdir()
    (shadow / "torch.py").write_text(TORCH)
    path = os.pathsep.join([str(shadow), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env={**os.environ, "PYTHONPATH": path, "NUMBER": str(int(number)), "LORASERVE_DATA": str(folder / "data")},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("has_model", [False, True], ids=["converts", "expands"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_stops_in_order_and_leaves_no_files(number: signal.Signals, has_model: bool, tmp_path: Path) -> None:
    if has_model:
        model = tmp_path / "data" / "models" / MODEL_NAME.lower()
        model.mkdir(parents=True)
        source = {"package": PACKAGE, "conversion": CONVERSION}
        (model / "source.json").write_text(json.dumps({"source": source, "file_bytes": {}}))
    done = interrupt(tmp_path, number, "loraserve.cluster", "up", "--port", str(free_port()))
    assert (done.returncode, "Traceback" in done.stderr) == (130, False), done.stderr
    assert not list((tmp_path / "data" / "run").glob("*"))
    assert not list((tmp_path / "data").rglob("*.partial"))


def test_training_reports_that_it_was_stopped(tmp_path: Path) -> None:
    done = interrupt(tmp_path, signal.SIGINT, "loraserve.demo.train_adapter", "--style", "pirate")
    assert (done.returncode, done.stderr) == (1, "stopped; nothing was written\n")


@pytest.mark.parametrize("module", ["loraserve.engine", "loraserve.engine.profile", "loraserve.demo.serve_store"])
def test_other_commands_are_ended_by_the_signal(module: str, tmp_path: Path) -> None:
    done = interrupt(tmp_path, signal.SIGINT, module)
    assert done.returncode == -signal.SIGINT, done.stderr
    assert done.stderr.splitlines()[-1] == "KeyboardInterrupt"


def test_sigterm_ends_an_engine_at_once(tmp_path: Path) -> None:
    assert interrupt(tmp_path, signal.SIGTERM, "loraserve.engine").returncode == -signal.SIGTERM
