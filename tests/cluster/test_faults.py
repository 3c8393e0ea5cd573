"""Runs a few rows of scripts/bench faults: killed, cut off and full processes, and no client that notices more."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from loraserve.testing.faults.shim import has_compiler

BENCHES = Path(__file__).resolve().parents[2] / "scripts" / "benches"


@pytest.mark.skipif(not has_compiler(), reason="needs Linux and a C compiler")
@pytest.mark.timeout(600)
def test_clients_notice_at_most_a_delay(demo_model: Path, measured: Callable[[str], None]) -> None:
    done = subprocess.run([sys.executable, str(BENCHES), "faults", "--quick"], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    found = json.loads(done.stdout.splitlines()[-1])["figures"]
    assert found["sent"] >= 10 * found["cells"]
    assert (found["corrupted"], found["failed_with_an_engine"]) == (0, 0)
    measured(f"faults: {found['sent']} requests under {found['cells']} faults, none failed")
