"""RDMA devices as the kernel lists them, and why there may be none to use: without opening any."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from loraserve.transfer.verbs_plan import best_gid

DEVICES = Path("/sys/class/infiniband")
ACTIVE = "4:"
ETHERNET = "Ethernet"
UNUSED_GIDS = 8
"""So many in a row end the search: tables have up to 1024 places and are filled from the front."""


class Port(msgspec.Struct, frozen=True, kw_only=True):
    device: str
    number: int
    gid_index: int
    gid: str
    link_layer: str


def usable_ports(devices: Path = DEVICES) -> list[Port]:
    """Those that are up, in the order of their names."""
    paths = sorted(devices.glob("*/ports/*"), key=lambda path: (path.parts[-3], int(path.name)))
    found = (_port(path) for path in paths)
    return [port for port in found if port is not None]


def why_not(devices: Path = DEVICES) -> str:
    """Why verbs cannot be used here; empty where they can. Where there is no device nothing is imported."""
    if not devices.is_dir() or not any(devices.iterdir()):
        return "this machine has no RDMA device"
    if not any(map(_is_up, devices.glob("*/ports/*"))):
        return "none of this machine's RDMA ports is up"
    if importlib.util.find_spec("pyverbs") is None:
        return "there is no pyverbs for this Python; install Debian's python3-pyverbs or the extra `rdma`"
    try:
        importlib.import_module("pyverbs.device")
    except ImportError as error:
        return f"pyverbs cannot be imported ({error}); it must be of the same release as libibverbs"
    return ""


def _port(path: Path) -> Port | None:
    if not _is_up(path):
        return None
    try:
        gid = best_gid(_gids(path))
        link_layer = _text(path / "link_layer")
    except OSError:
        # It went away.
        return None
    if gid is None:
        return None
    return Port(device=path.parts[-3], number=int(path.name), gid_index=gid[0], gid=gid[1], link_layer=link_layer)


def _is_up(path: Path) -> bool:
    try:
        return _text(path / "state").startswith(ACTIVE)
    except OSError:
        return False


def _gids(path: Path) -> Iterator[tuple[int, str, str]]:
    unused = 0
    for index in range(len(os.listdir(path / "gids"))):
        try:
            # The kernel answers with an error for one that is not in use.
            kind = _text(path / "gid_attrs" / "types" / str(index))
        except OSError:
            unused += 1
            if unused == UNUSED_GIDS:
                return
            continue
        unused = 0
        yield index, _text(path / "gids" / str(index)), kind


def _text(path: Path) -> str:
    return path.read_text().strip()
