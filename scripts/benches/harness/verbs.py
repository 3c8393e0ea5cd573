"""Measures RDMA reads against perftest's ib_read_bw, on an RDMA device or in the virtual machine of scripts/rdma_vm."""

import os
import shlex
import subprocess
import sys

import msgspec

from harness.report import ROOT, Number, rounded, say, table
from loraserve.transfer.verbs.device import unusable_reason

SKIPPED = 77
TIMEOUT_S = 600
SIZES_MIB = (1, 4, 16, 64, 256)


class Slab(msgspec.Struct, frozen=True):
    """MiB/s of one slab size, as printed by loraserve.testing.verbs_bandwidth."""

    slab_mib: int
    verbs: float
    ib_read_bw: float | None
    ratio: float | None


def measure_verbs() -> list[Slab]:
    """Return the measurements. If RDMA is not available, print the reason and return none."""
    sizes = " ".join(map(str, SIZES_MIB))
    module = f"-m loraserve.testing.verbs_bandwidth {sizes}"
    if not unusable_reason():
        command = [sys.executable, *module.split()]
    else:
        say(f"verbs: {unusable_reason()}; using a virtual machine, which takes a minute or more")
        places = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        within = "PYTHONPATH=" + os.pathsep.join([*map(shlex.quote, map(os.path.abspath, places)), "$RDMA_VM_PYVERBS"])
        command = [str(ROOT / "scripts" / "rdma_vm"), f"{within} {shlex.quote(sys.executable)} {module}", str(ROOT)]
    environ = {**os.environ, "RDMA_VM_TIMEOUT": str(TIMEOUT_S), "RDMA_VM_ENV": "PYTHONSAFEPATH"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    lines = [*done.stdout.splitlines(), *done.stderr.splitlines()]
    found = next((line for line in done.stdout.splitlines() if line.startswith("[{")), None)
    if done.returncode != 0 or found is None:
        skip = next((line for line in reversed(lines) if line.startswith("SKIP:")), None)
        say(f"verbs not measured: {skip or (lines[-1] if lines else f'exit status {done.returncode}')}")
        return []
    return msgspec.json.decode(found, type=list[Slab])


def verbs_ratio(slabs: list[Slab]) -> Number:
    """Return the ratio of the worst size, or None if perftest is not installed."""
    known = [slab.ratio for slab in slabs if slab.ratio is not None]
    return rounded(min(known)) if known else None


def verbs_figures(slabs: list[Slab]) -> dict[str, Number]:
    mib = 1 << 20
    found: dict[str, Number] = {}
    for slab in slabs:
        found[f"verbs_{slab.slab_mib}_mib_bytes_per_s"] = slab.verbs * mib
        found[f"ib_read_bw_{slab.slab_mib}_mib_bytes_per_s"] = slab.ib_read_bw and slab.ib_read_bw * mib
    return found


def verbs_table(slabs: list[Slab]) -> str:
    rows: list[list[object]] = [[f"{s.slab_mib} MiB", s.verbs, s.ib_read_bw, s.ratio] for s in slabs]
    return table("verbs, MiB/s", ["slab", "verbs", "ib_read_bw", "ratio"], [*rows, ["goal", "", "", ">= 0.7"]])
