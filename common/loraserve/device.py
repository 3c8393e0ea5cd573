"""Detects the devices, cores and memory of this machine without initializing a GPU."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

Device = Literal["cpu", "cuda"]
CPU_ENGINES = 2


def resolve_device(setting: Literal["auto", "cpu", "cuda"], devices: Path = Path("/dev")) -> Device:
    """Return the device for a setting. auto means cuda if the NVIDIA driver shows a GPU to this process, else cpu."""
    if setting != "auto":
        return setting
    return "cuda" if gpu_count(devices) else "cpu"


def gpu_count(devices: Path = Path("/dev")) -> int:
    """Return the number of GPUs that this process may use, limited by CUDA_VISIBLE_DEVICES.

    Windows Subsystem for Linux does not report the number of GPUs, so one is assumed there.
    """
    shown = len(list(devices.glob("nvidia[0-9]*"))) or int((devices / "dxg").exists())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return shown if visible is None else min(shown, _listed(visible))


def core_count() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_limit_bytes(
    limits: Sequence[Path] = (
        Path("/sys/fs/cgroup/memory.max"),
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
    ),
) -> int:
    """Return the bytes of memory that this process may use: the machine's memory or the container limit if lower."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(limit for path in limits if (limit := _number(path)))])


def available_memory_share(meminfo: Path = Path("/proc/meminfo"), groups: Path = Path("/sys/fs/cgroup")) -> float:
    """Return the available fraction (0 to 1) of the memory that this process may use, or 0 if it is unknown."""
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
    """Return the integer in a file, or 0 if the file is missing or holds something else."""
    try:
        text = path.read_text().strip()
    except OSError:
        return 0
    return int(text) if text.isdecimal() else 0


def gpu_name(driver: Path = Path("/proc/driver/nvidia/gpus")) -> str:
    """Return the NVIDIA driver's name for the first GPU, or "" if it lists no GPU."""
    try:
        lines = next(iter(sorted(driver.glob("*/information")))).read_text().splitlines()
    except (OSError, StopIteration):
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("Model:")), "")


def _listed(visible: str) -> int:
    """Count the GPUs in a value of CUDA_VISIBLE_DEVICES. CUDA ignores all entries after an invalid one."""
    names = [name.strip() for name in visible.split(",")]
    return next((index for index, name in enumerate(names) if name in ("", "-1", "NoDevFiles")), len(names))


def default_engines(setting: Literal["auto", "cpu", "cuda"], devices: Path = Path("/dev")) -> int:
    """Return one engine per GPU, or two engines on a CPU, so that the planner can choose between them."""
    return max(1, gpu_count(devices)) if resolve_device(setting, devices) == "cuda" else CPU_ENGINES
