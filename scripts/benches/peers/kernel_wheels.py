"""Installs kernel files of vLLM and SGLang: downloads the wheels and unpacks a few files of each."""

import fnmatch
import shutil
import subprocess
import sys
import tempfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

from harness.report import BenchError, say

from loraserve.benchmarks.lora.peers import SGLANG, VLLM, WANTED, missing, version

REQUIREMENTS = {VLLM: "vllm>=0.33", SGLANG: "sglang>=0.5.23"}
LICENCE_FILES = ("*.dist-info/licenses/LICENSE*", "*.dist-info/LICENSE*")


def install(folder: Path, name: str) -> None:
    """Install into ``folder / name``, unless it is complete. Raises BenchError if the wheel cannot be downloaded."""
    if not missing(folder, name):
        say(f"{name} {version(folder, name)} is installed")
        return
    with tempfile.TemporaryDirectory(prefix="loraserve-peers-") as scratch:
        wheel = _download(REQUIREMENTS[name], Path(scratch))
        fresh = Path(scratch) / name
        count, size = unpack(wheel, fresh, name)
        shutil.rmtree(folder / name, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.move(fresh, folder / name)
        say(
            f"{name} {version(folder, name)} ({(folder / name / 'LICENCE').read_text()}): {count} files, "
            f"{size / 1024:.0f} KiB of a wheel of {wheel.stat().st_size / 1e6:.0f} MB, in {folder / name}"
        )
    absent = missing(folder, name)
    if absent:
        raise BenchError(f"{name} {version(folder, name)} has no {', '.join(absent)}: its kernels have moved")


def unpack(wheel: Path, target: Path, name: str) -> tuple[int, int]:
    """Unpack the wanted files with version and licence. Returns the number of files and bytes."""
    count = size = 0
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            if not info.is_dir() and _is_wanted(info.filename, name):
                archive.extract(info, target)
                count, size = count + 1, size + info.file_size
        (metadata,) = fnmatch.filter(archive.namelist(), "*.dist-info/METADATA")
        headers = HeaderParser().parsestr(archive.read(metadata).decode())
    (target / "VERSION").write_text(headers["Version"])
    (target / "LICENCE").write_text(_licence(headers["License-Expression"], headers.get_all("Classifier", [])))
    return count, size


def _is_wanted(path: str, name: str) -> bool:
    return any(fnmatch.fnmatch(path, pattern) for pattern in (*WANTED[name], *LICENCE_FILES))


def _licence(expression: str | None, classifiers: list[str]) -> str:
    named = [line.rpartition(" :: ")[2] for line in classifiers if line.startswith("License")]
    return expression or ", ".join(named) or "licence not named"


def _download(requirement: str, folder: Path) -> Path:
    say(f"downloading {requirement} (up to some hundred MB)")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "-d", str(folder)]
    done = subprocess.run([*command, requirement], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise BenchError(f"pip download {requirement} failed:\n" + "\n".join(done.stdout.splitlines()[-8:]))
    return wheels[0]
