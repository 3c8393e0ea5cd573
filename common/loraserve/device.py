"""Which kind of device engines compute on, as far as that can be told without asking the device itself."""

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
    """GPUs that the driver shows to this process; Windows' subsystem for Linux shows no number, so one."""
    return len(list(devices.glob("nvidia[0-9]*"))) or int((devices / "dxg").exists())


def default_engines(setting: Literal["auto", "cpu", "cuda"], devices: Path = Path("/dev")) -> int:
    """One for each GPU; on a CPU two, so that placement and routing have something to decide."""
    return max(1, gpus(devices)) if device_of(setting, devices) == "cuda" else CPU_ENGINES
