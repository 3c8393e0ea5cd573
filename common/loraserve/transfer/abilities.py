"""Detects the transports over which this process can read other processes' memory and offer its own."""

import os
from collections.abc import Sequence
from pathlib import Path

from loraserve.messages.transfer import TRANSFER_PROTOCOL_VERSION, Abilities, Transport
from loraserve.transfer import cuda_ipc, shm
from loraserve.transfer.verbs import device as verbs_device

NAMESPACES = ("pid", "ipc")


def local_abilities(offered: Sequence[Transport], device: str, gpu: int = 0) -> Abilities:
    """Return this process's abilities, with the transports of ``offered`` that work here.

    ``device`` is ``cpu`` or ``cuda``; for ``cuda``, ``gpu`` is the number of the GPU.
    """
    return Abilities(
        protocol=TRANSFER_PROTOCOL_VERSION,
        host=_boot_id(),
        neighbourhood=_neighbourhood(),
        transports=tuple(each for each in offered if _works_here(each, device, gpu)),
        device=device,
    )


def _works_here(transport: Transport, device: str, gpu: int) -> bool:
    match transport:
        case "shm":
            return shm.is_supported()
        case "verbs":
            return not verbs_device.unusable_reason()
        case "cuda_ipc":
            return device == "cuda" and not cuda_ipc.unusable_reason(gpu)
        case "tcp":
            return True


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _neighbourhood() -> str:
    try:
        namespaces = [os.readlink(f"/proc/self/ns/{name}") for name in NAMESPACES]
    except OSError:
        return ""
    return " ".join([*namespaces, f"user:{os.getuid()}"])
