"""A Python interpreter for the processes of a cluster in which each process can be disturbed.

``write_interpreter`` writes a shell script. Run as ``SCRIPT -m loraserve.KIND --name NAME``, it preloads the library of
the process's faults and runs the module with a faulty bus. A supervisor that runs with it starts its processes with it.
"""

import os
import runpy
import sys
from collections.abc import Iterable
from pathlib import Path
from random import Random
from types import UnionType
from typing import Any

from loraserve import process
from loraserve.bus.protocol import Bus
from loraserve.bus.zmq import open_bus
from loraserve.config import Config
from loraserve.testing.faults.bus import FaultyBus
from loraserve.testing.faults.shim import Shim, build_shim

SCRIPT = """#!/bin/sh
name=none
previous=
for argument; do
    if [ "$previous" = --name ]; then name=$argument; fi
    previous=$argument
done
if [ -e "{folder}/$name" ]; then
    export FAULT_SHIM_FILE="{folder}/$name" FAULT_SHIM_ROOT="{root}" LD_PRELOAD="{library}"
fi
export FAULT_INTERPRETER="$0"
exec "{python}" -m loraserve.testing.faults.interpreter "$@"
"""


def write_interpreter(folder: Path, root: Path, names: Iterable[str]) -> tuple[Path, dict[str, Shim]]:
    """Return the path of the script, and the faults by process name. ``root`` is the folder on the faulty disk."""
    folder.mkdir(parents=True, exist_ok=True)
    library = build_shim(folder / "library")
    faults = {name: Shim(library, folder / name, root) for name in names}
    script = folder / "python.sh"
    script.write_text(SCRIPT.format(folder=folder, root=root, library=library, python=sys.executable))
    script.chmod(0o755)
    return script, faults


def run_module(arguments: list[str]) -> None:
    """Run ``-m MODULE ...`` as the interpreter does, with faulty buses if the process may be disturbed."""
    sys.executable = os.environ["FAULT_INTERPRETER"]
    if file := os.environ.pop("FAULT_SHIM_FILE", ""):

        def open_faulty_bus(config: Config, name: str, inbox: type[Any] | UnionType | None) -> Bus:
            return FaultyBus(open_bus(config, name, inbox), Shim(Path(), Path(file), Path()), Random())

        # The product's entry point opens the bus, so it is replaced there.
        vars(process)["open_bus"] = open_faulty_bus
        # The library has read its variables. Programs that this process starts must not be disturbed.
        del os.environ["LD_PRELOAD"]
    _, module, *rest = arguments
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    run_module(sys.argv[1:])
