"""scripts/gpu_check without a GPU: refusals, the parts that it would run, and how results are read and recorded."""

import importlib.util
import json
import subprocess
import sys
import time
import zipfile
from importlib.machinery import SourceFileLoader
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "gpu_check"
RESULT = {
    "machine": {"gpu": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0"},
    "date": "2026-11-25",
    "commit": "abc1234",
    "command": "scripts/gpu_check",
    "parts": {
        "accuracy": {"status": "passed", "took_s": 12.0, "figures": {"checks": 24, "largest_error": 0.00312345}},
        "bench_lora": {"status": "failed (1)", "took_s": 3.0, "figures": {"ratios": {"vs_vllm_128": None}}},
    },
}


@pytest.fixture
def script() -> Any:
    loader = SourceFileLoader("gpu_check", str(SCRIPT))
    spec = importlib.util.spec_from_loader("gpu_check", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--out", tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "torch sees no CUDA GPU" in done.stdout
    assert not (tmp_path / "out").exists()


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--only", "tests", "benches", "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--only benches: the parts are accuracy, bench_lora, bench_engine, sanitizer" in done.stderr


def test_a_python_that_lacks_something_is_told_which_one_has_it(
    script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    script.NEEDED = ("not_there_at_all",)
    assert script.check(SimpleNamespace(wheels=None)) == 1
    said = capsys.readouterr().out
    assert said.startswith(f"error: {sys.executable} lacks not_there_at_all; ")
    assert ".venv/bin/python" in said


def test_every_part_is_there_and_all_fit_into_the_time(script: Any) -> None:
    found = {name: command for name, _, command, _ in script.parts(quick=True, peers="")}
    for name, command in found.items():
        modules = [after for word, after in pairwise(command) if word == "-m"]
        assert modules, name
        assert all(importlib.util.find_spec(module) for module in modules), modules
    for tests in (script.KERNEL_TESTS, script.TESTS):
        assert tests == script.existing(tests), "a test was renamed"
    assert script.LIMIT_S < 9 * 60


def test_a_hanging_part_is_stopped_and_a_failing_one_is_reported(script: Any, tmp_path: Path) -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert script.run_part("hangs", sleep, 0.5, None, tmp_path)["status"] == "stopped after 0 s"
    fails = script.run_part("fails", [sys.executable, "-c", "print('{\"a\": 1}'); exit(3)"], 60, None, tmp_path)
    assert (fails["status"], fails["figures"]) == ("failed (3)", {"a": 1})
    assert script.run_part("absent", ["no-such-program"], 9, None, tmp_path)["status"] == (
        "not run: no-such-program is not installed"
    )


def test_the_children_of_a_stopped_part_are_stopped(script: Any, tmp_path: Path) -> None:
    late = tmp_path / "late"
    child = f"import pathlib, time; time.sleep(3); pathlib.Path({str(late)!r}).touch()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert script.run_part("parent", [sys.executable, "-c", code], 1, None, tmp_path)["status"] == "stopped after 1 s"
    time.sleep(3)
    assert not late.exists()


def test_a_log_line_that_only_looks_like_json_is_ignored(script: Any) -> None:
    assert script.figures("tests", '{"a": 1}\n{not json}\n') == {"a": 1}
    assert script.figures("tests", "{not json}\n1 failed\n") == {"last_line": "1 failed"}


def test_without_git_there_is_no_commit(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert script.commit() is None


def test_wheels_are_unpacked_for_the_run(script: Any, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried_for_a_test.py", "x = 1\n")
    env = script.environment(str(tmp_path))
    assert script.missing(env, ["carried_for_a_test", "loraserve.kernels.lora.gpu", "not_there_at_all"]) == [
        "not_there_at_all"
    ]
    with pytest.raises(SystemExit, match=r"contains no \.whl file"):
        script.environment(str(tmp_path / "nowhere"))


def test_figures_are_written_into_their_place(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "BENCHMARKS.md"
    page.write_text(f"before\n{script.BEGIN}\nnot measured\n{script.END}\nafter\n")
    monkeypatch.setattr(script, "BENCHMARKS", page)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    assert script.record(tmp_path / "result.json") == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "NVIDIA H200, torch 2.11.0, triton 3.6.0, commit abc1234" in text
    assert "| accuracy: largest_error | 0.003123 |" in text
    assert "| bench_lora: ratios.vs_vllm_128 | not measured |" in text
    assert "| bench_lora | failed (1) | 3.0 |" in text
    page.write_text("no place for figures\n")
    assert script.record(tmp_path / "result.json") == 1


def test_the_real_page_has_the_place(script: Any) -> None:
    text = script.BENCHMARKS.read_text()
    assert text.count(script.BEGIN) == text.count(script.END) == 1
