"""The suite passes in a process that ignores SIGINT, such as a background job of a script."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
TEST = "tests/unit/repository/test_scripts.py::test_ctrl_c_in_an_install_ends_in_one_line"


def test_a_suite_that_ignores_sigint_gives_its_children_the_default_handler() -> None:
    suite = f"{sys.executable} -m pytest -q -p no:cacheprovider {TEST}"
    done = subprocess.run(
        ["bash", "-c", f"trap '' INT; exec {suite}"], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout
