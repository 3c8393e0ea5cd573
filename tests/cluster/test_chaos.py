"""Runs scripts/bench chaos briefly: engines are killed, stopped and corrupted, and no text is wrong."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

BENCHES = Path(__file__).resolve().parents[2] / "scripts" / "benches"
MINUTES = 0.4
DONE = ("owners_killed", "readers_killed", "owners_stopped", "readers_stopped", "poisonings")
SHOWN = ("requests", "migrations", *DONE, "mismatches_seen", "read_over_shm", "read_over_tcp")


@pytest.mark.timeout(600)
def test_clients_of_killed_and_corrupted_engines_get_right_texts(
    demo_model: Path, measured: Callable[[str], None]
) -> None:
    command = [sys.executable, str(BENCHES), "chaos", "--minutes", str(MINUTES)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    counts = json.loads(done.stdout.splitlines()[-1])["figures"]
    assert counts["requests"] > 0
    assert sum(counts[name] for name in DONE) > 0, "nothing was done to any engine"
    measured("chaos: " + ", ".join(f"{counts[name]} {name.replace('_', ' ')}" for name in SHOWN))
