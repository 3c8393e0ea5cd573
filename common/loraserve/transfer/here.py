"""What this process can announce of itself."""

import os
from collections.abc import Sequence
from pathlib import Path

from loraserve.transfer import cuda_ipc, verbs_ports
from loraserve.transfer.choice import Abilities
from loraserve.transfer.protocol import PROTOCOL, Transport
from loraserve.transfer.shared_memory import supported

NAMESPACES = ("pid", "ipc")


def abilities(offered: Sequence[Transport], device: str, gpu: int = 0) -> Abilities:
    """``offered``, but for what this machine cannot do. ``gpu`` is which one, where ``device`` is ``cuda``."""
    return Abilities(
        protocol=PROTOCOL,
        host=_boot(),
        neighbourhood=_neighbourhood(),
        transports=tuple(each for each in offered if _possible(each, device, gpu)),
        device=device,
    )


def _possible(transport: Transport, device: str, gpu: int) -> bool:
    match transport:
        case "shm":
            return supported()
        case "verbs":
            return not verbs_ports.why_not()
        case "cuda_ipc":
            return device == "cuda" and not cuda_ipc.why_not(gpu)
        case "tcp":
            return True


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _neighbourhood() -> str:
    try:
        spaces = [os.readlink(f"/proc/self/ns/{name}") for name in NAMESPACES]
    except OSError:
        return ""
    return " ".join([*spaces, f"user:{os.getuid()}"])
