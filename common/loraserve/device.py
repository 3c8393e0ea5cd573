"""Which kind of device engines compute on, as far as that can be told without asking the device itself."""

from pathlib import Path
from typing import Literal

Device = Literal["cpu", "cuda"]


def device_of(setting: Literal["auto", "cpu", "cuda"], devices: Path = Path("/dev")) -> Device:
    """``engine.device`` with auto resolved: cuda where the NVIDIA driver shows a GPU to this process."""
    if setting != "auto":
        return setting
    return "cuda" if any(devices.glob("nvidia[0-9]*")) or (devices / "dxg").exists() else "cpu"
