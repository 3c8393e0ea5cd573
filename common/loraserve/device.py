"""Which kind of device engines compute on, as far as that can be told without asking the device itself."""

import os
from pathlib import Path
from typing import Literal

Device = Literal["cpu", "cuda"]
CPU_ENGINES = 2


def device_of(setting: Literal["auto", "cpu", "cuda"], devices: Path = Path("/dev")) -> Device:
    """``engine.device`` with auto resolved: cuda where the NVIDIA driver shows a GPU to this process."""
    if setting != "auto":
        return setting
    return "cuda" if gpus(devices) else "cpu"


def gpus(devices: Path = Path("/dev")) -> int:
    """GPUs that this process may use. Windows' subsystem for Linux shows no number, so one.

    CUDA_VISIBLE_DEVICES hides some or all of what the driver shows, as it does from CUDA itself.
    """
    shown = len(list(devices.glob("nvidia[0-9]*"))) or int((devices / "dxg").exists())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return shown if visible is None else min(shown, _listed(visible))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu_name(driver: Path = Path("/proc/driver/nvidia/gpus")) -> str:
    """What the NVIDIA driver calls the first GPU; "" where it does not say."""
    try:
        lines = next(iter(sorted(driver.glob("*/information")))).read_text().splitlines()
    except (OSError, StopIteration):
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("Model:")), "")


def _listed(visible: str) -> int:
    """Entries up to the first that names no GPU, which hides those behind it."""
    names = [name.strip() for name in visible.split(",")]
    return next((index for index, name in enumerate(names) if name in ("", "-1", "NoDevFiles")), len(names))


def default_engines(setting: Literal["auto", "cpu", "cuda"], devices: Path = Path("/dev")) -> int:
    """One for each GPU; on a CPU two, so that placement and routing have something to decide."""
    return max(1, gpus(devices)) if device_of(setting, devices) == "cuda" else CPU_ENGINES
