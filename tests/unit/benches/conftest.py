"""Benches are scripts and not part of the package, so their folder is added to the path here."""

import sys
from pathlib import Path

import pytest

from loraserve.testing import local_cluster

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts" / "benches"))


@pytest.fixture
def free_port() -> int:
    return local_cluster.free_port()
