"""Tests of this folder need an RDMA device. Where there is none, test_vm.py runs the others in a virtual machine.

They import no torch: that takes more than a minute in there.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loraserve.config import ClusterConfig, Config
from loraserve.testing.memory_owner import pattern
from loraserve.testing.verbs_owner import VerbsOwner
from loraserve.transfer.verbs.device import unusable_reason

LENGTH = 8 << 20
SKIPPED = 77
WHY_NOT = unusable_reason()
collect_ignore_glob = ["test_verbs*.py", "test_engines.py"] if WHY_NOT else []


def pytest_configure() -> None:
    if os.environ.get("RDMA_VM") and WHY_NOT:
        # Debian's pyverbs is for one version of Python.
        print(f"SKIP: in the virtual machine {WHY_NOT}", flush=True)
        pytest.exit(WHY_NOT, returncode=SKIPPED)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.rdma)


@pytest.fixture
def say(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Return a function that prints even when pytest captures output. test_vm.py collects the lines."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def through(text: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\n[rdma] {text}", flush=True)

    return through


@pytest.fixture(scope="session")
def config() -> Iterator[Config]:
    with tempfile.TemporaryDirectory(prefix="ls-") as folder:
        yield Config(cluster=ClusterConfig(run_dir=f"{folder}/run"))


@pytest.fixture(scope="session")
def lasting(config: Config) -> Iterator[VerbsOwner]:
    with VerbsOwner(pattern(LENGTH), config) as owner:
        yield owner


@pytest.fixture
def owner(lasting: VerbsOwner) -> VerbsOwner:
    """An owner without connections."""
    lasting.forget("reader")
    return lasting


@pytest.fixture
def mortal(config: Config) -> Iterator[VerbsOwner]:
    with VerbsOwner(pattern(LENGTH), config, "mortal") as owner:
        yield owner
