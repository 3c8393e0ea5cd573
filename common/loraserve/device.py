"""Which kind of device engines compute on, as far as that can be told without asking the device itself."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

Device = Literal["cpu", "cuda"]
CPU_ENGINES = 2


def resolve_device(setting: Literal["auto", "cpu", "cuda"], devices: Path = Path("/dev")) -> Device:
    """``engine.device`` with auto resolved: cuda where the NVIDIA driver shows a GPU to this process."""
    if setting != "auto":
        return setting
    return "cuda" if gpu_count(devices) else "cpu"


def gpu_count(devices: Path = Path("/dev")) -> int:
    """GPUs that this process may use. Windows' subsystem for Linux shows no number, so one.

    CUDA_VISIBLE_DEVICES hides some or all of what the driver shows, as it does from CUDA itself.
    """
    shown = len(list(devices.glob("nvidia[0-9]*"))) or int((devices / "dxg").exists())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return shown if visible is None else min(shown, _listed(visible))


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_limit_bytes(
    limits: Sequence[Path] = (
        Path("/sys/fs/cgroup/memory.max"),
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
    ),
) -> int:
    """Memory that this process may use: the machine's, or less where its container is limited."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(limit for path in limits if (limit := _number(path)))])


def available_memory_share(meminfo: Path = Path("/proc/meminfo"), groups: Path = Path("/sys/fs/cgroup")) -> float:
    """Of the memory that this process may use, what can be had without taking it from anybody; 0 where nobody knows."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        share = int(lines["MemAvailable"].split()[0]) / int(lines["MemTotal"].split()[0])
    except (OSError, KeyError, ValueError, IndexError, ZeroDivisionError):
        return 0.0
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        if most := _number(groups / limit):
            share = min(share, max(0.0, 1 - _number(groups / used) / most))
    return share


def _number(path: Path) -> int:
    """0 where it holds none."""
    try:
        text = path.read_text().strip()
    except OSError:
        return 0
    return int(text) if text.isdecimal() else 0


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
    return max(1, gpu_count(devices)) if resolve_device(setting, devices) == "cuda" else CPU_ENGINES
