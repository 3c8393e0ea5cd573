"""When kernels are compiled, and where the machine code is cached."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import pytest
import torch
from numba.core import event

from loraserve.kernels import attention, lora
from loraserve.kernels.cpu import compiled
from loraserve.kernels.fused import cpu as fused

CALL = """
import torch
from loraserve.kernels.fused import cpu as fused
out = fused.silu_mul(torch.ones(1, 4), torch.empty(1, 2))
print(round(float(out[0, 0]), 4))
"""


def start(cache: Path, **environment: str) -> "subprocess.Popen[str]":
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    variables.pop("NUMBA_CACHE_DIR", None)
    if cache != Path():
        variables["NUMBA_CACHE_DIR"] = str(cache)
    return subprocess.Popen(
        [sys.executable, "-c", CALL], env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: "subprocess.Popen[str]") -> None:
    out, errors = process.communicate(timeout=120)
    assert (process.returncode, out.strip()) == (0, "0.7311"), errors


def test_a_warm_step_compiles_nothing(mixed: Callable[[str, str], Any], sequences_of: Any) -> None:
    lora.warm_up(torch.bfloat16)
    attention.warm_up()
    fused.warm_up()
    a = mixed("even", "bfloat16")
    sequences = sequences_of(a.shape, [20, 5], 16, 1)
    with event.install_recorder("numba:compile") as recorder:
        for tokens in (1, 2, 9):
            y, x = a.operands(2, tokens)
            batch = lora.plan_batch(torch.arange(tokens, dtype=torch.int32) % 5)
            lora.add_lora(y, x, a.pool, a.tables, batch, 1, 2)
            fused.silu_mul(y, torch.empty(tokens, 192))
        q, k, v, steps = sequences.step([(0, 0, 20), (1, 0, 5)])
        attention.paged_attention(q, k, v, sequences.cache, steps, 0, 1.0)
    assert recorder.buffer == []


def test_processes_that_compile_at_once_share_the_cache_with_the_next(tmp_path: Path) -> None:
    for process in [start(tmp_path) for _ in range(2)]:
        finish(process)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nbc")}
    assert kept
    finish(start(tmp_path))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nbc")} == kept


def test_a_damaged_cache_costs_only_time(tmp_path: Path) -> None:
    finish(start(tmp_path))
    for path in [*tmp_path.rglob("*.nbi"), *tmp_path.rglob("*.nbc")]:
        path.write_bytes(path.read_bytes()[:20])
    finish(start(tmp_path))


def test_without_a_cache_folder_kernels_compile_in_memory(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    finish(start(Path(), HOME=str(file), XDG_CACHE_HOME=str(file / "cache")))


def test_the_cache_is_named_after_the_source_of_all_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    assert compiled.cache_dir().parent == tmp_path / "loraserve-kernels"
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    if sys.platform != "darwin":
        assert compiled.cache_dir().parent == tmp_path / "x" / "loraserve-kernels"


def test_the_cache_folder_of_other_numba_code_does_not_change() -> None:
    config: Any = numba.config
    before = config.CACHE_DIR
    compiled.Kernel(lambda operands: None).warm_up()
    assert before == config.CACHE_DIR
