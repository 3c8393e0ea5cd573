"""Runs the other tests of this folder in a virtual machine with a software RDMA device, and shows their output."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from loraserve.transfer.verbs.device import unusable_reason

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = 77
MAKING_S = 200.0
"""The first run downloads packages. Later runs start the machine quickly."""
RUN_S = 420.0
SAID = re.compile(r"^(\[rdma\].*|rdma_vm: .*|=+ .*(passed|failed).*|tests/rdma/\S+::.*|(PASSED|FAILED|ERROR).*)$")
PYTEST = ["-p", "no:cacheprovider", "-p", "pytest_timeout", "--confcutdir=tests/rdma", "--tb=short", "-v"]


@pytest.mark.skipif(not unusable_reason(), reason="this machine has an RDMA device: the tests run on it")
@pytest.mark.timeout(MAKING_S + RUN_S)
def test_the_rdma_tests_pass_in_a_virtual_machine(measured: Callable[[str], None]) -> None:
    places = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    within = "PYTHONPATH=" + os.pathsep.join([*map(shlex.quote, places), "$RDMA_VM_PYVERBS"])
    command = f"{within} {shlex.join([sys.executable, '-m', 'pytest', 'tests/rdma', *PYTEST])}"
    environ = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    names = "PYTEST_DISABLE_PLUGIN_AUTOLOAD PYTHONSAFEPATH"
    done = subprocess.run(
        [ROOT / "scripts" / "rdma_vm", command, ROOT],
        env={**environ, "RDMA_VM_ENV": names, "RDMA_VM_TIMEOUT": f"{RUN_S:.0f}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = done.stdout.splitlines()
    if done.returncode == SKIPPED:
        pytest.skip(next(line for line in reversed(lines) if line.startswith("SKIP:")))
    for line in lines:
        if SAID.match(line):
            measured(f"rdma: {line}")
    assert done.returncode == 0, done.stdout[-8000:]
