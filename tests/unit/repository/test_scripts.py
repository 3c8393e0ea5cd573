"""Scripts run from any folder, and an interrupted installation is continued."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"


def bootstrap(code: str) -> list[str]:
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); import _bootstrap; {code}"]


def environment(venv: Path) -> dict[str, str]:
    return {**os.environ, "LORASERVE_VENV": str(venv)}


def run(code: str, venv: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(bootstrap(code), env=environment(venv), capture_output=True, text=True)


def test_an_incomplete_venv_is_created_again(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    done = run("_bootstrap._make_venv()", venv)
    assert done.returncode == 0, done.stderr
    assert (venv / "bin" / "pip").exists()
    assert run("_bootstrap._make_venv()", venv).stderr == "", "one that is whole is left alone"


@pytest.mark.parametrize("is_venv", [False, True])
def test_a_folder_with_other_files_is_not_cleared(tmp_path: Path, is_venv: bool) -> None:
    if is_venv:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path)], check=True)
        (next(tmp_path.glob("lib/python*/site-packages")) / "own.py").touch()
    (tmp_path / "mine").write_text("precious")
    done = run("_bootstrap._make_venv()", tmp_path)
    assert done.returncode == 1
    assert "LORASERVE_VENV" in done.stderr
    assert (tmp_path / "mine").read_text() == "precious"


def test_ctrl_c_in_an_install_ends_in_one_line(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    command = bootstrap("_bootstrap.ensure_installed(())")
    # a session of its own, so that the signal reaches all of it, as from a terminal
    process = subprocess.Popen(
        command, env=environment(venv), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    assert "creating" in process.stderr.readline()
    os.killpg(process.pid, signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait() == 130
    assert rest == "stopped; run the script again to continue the installation\n"


OPS = ["status", "adapters", "rebalance", "drain", "undrain", "story"]


@pytest.mark.parametrize(
    "script",
    [
        "up",
        "down",
        "restart",
        *OPS,
        "profile",
        "simulate",
        "twin",
        "train_adapter",
        "bench",
        "tune_kernels",
        "test",
        "structure",
    ],
)
def test_modules_in_the_users_folder_are_not_imported(script: str, tmp_path: Path) -> None:
    for name in ("random", "json", "argparse", "asyncio", "loraserve"):
        (tmp_path / f"{name}.py").write_text('raise SystemExit("boo")')
    for safe in ({}, {"PYTHONSAFEPATH": "1"}):
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
        command = [sys.executable, str(SCRIPTS / script), "--help"]
        done = subprocess.run(command, cwd=tmp_path, env={**inherited, **safe}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"scripts/{script}" in done.stdout or "usage:" in done.stdout


@pytest.mark.parametrize("script", ["up", "train_adapter"])
def test_scripts_run_in_the_venv_that_the_user_names(script: str, tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    command = [sys.executable, str(SCRIPTS / script), "--help"]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True)
    assert (done.returncode, f"LORASERVE_VENV={tmp_path}" in done.stderr) == (1, True)


def test_rdma_vm_has_help_and_skips_with_one_line(tmp_path: Path) -> None:
    script = SCRIPTS / "rdma_vm"
    shown = subprocess.run([script, "--help"], capture_output=True, text=True)
    assert (shown.returncode, "scripts/rdma_vm COMMAND" in shown.stdout, "set -" in shown.stdout) == (0, True, False)
    for tool in ("bash", "uname"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    for required, status in (("0", 77), ("1", 125)):
        bare = {"PATH": str(tmp_path), "HOME": str(tmp_path), "RDMA_VM_REQUIRED": required}
        done = subprocess.run([script, "true"], env=bare, capture_output=True, text=True)
        assert done.returncode == status
        assert done.stderr.startswith("SKIP: rdma_vm: ")
        assert done.stderr.count("\n") == 1
