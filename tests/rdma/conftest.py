"""Tests of this folder need an RDMA device. Where there is none, test_vm.py runs the others in a virtual machine.

They import no torch: that takes more than a minute in there.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from loraserve.transfer.verbs_ports import why_not

WHY_NOT = why_not()
collect_ignore_glob = ["test_verbs*.py"] if WHY_NOT else []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.rdma)


@pytest.fixture
def say(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Prints at once, captured or not: test_vm.py picks these lines out."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def through(text: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\n[rdma] {text}", flush=True)

    return through
