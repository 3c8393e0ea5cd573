"""What this process can announce of itself."""

import os
from collections.abc import Sequence
from pathlib import Path

from loraserve.transfer.choice import Abilities
from loraserve.transfer.protocol import PROTOCOL, Transport
from loraserve.transfer.shared_memory import supported
from loraserve.transfer.verbs_ports import why_not

NAMESPACES = ("pid", "ipc")


def abilities(offered: Sequence[Transport], device: str) -> Abilities:
    """``offered``, but for what this machine cannot do."""
    return Abilities(
        protocol=PROTOCOL,
        host=_boot(),
        neighbourhood=_neighbourhood(),
        transports=tuple(each for each in offered if _possible(each)),
        device=device,
    )


def _possible(transport: Transport) -> bool:
    match transport:
        case "shm":
            return supported()
        case "verbs":
            return not why_not()
        case "cuda_ipc" | "tcp":
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
