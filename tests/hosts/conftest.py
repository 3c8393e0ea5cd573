"""Tests of this folder need network namespaces (root and /dev/net/tun), and are skipped with a reason without them."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraserve.benchmarks.hosts.cells import Known, prepare
from loraserve.benchmarks.hosts.cluster import HostCluster, host_cluster
from loraserve.benchmarks.hosts.network import unusable_reason

WHY_NOT = unusable_reason()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.hosts)
            if WHY_NOT:
                item.add_marker(pytest.mark.skip(reason=WHY_NOT))


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HostCluster, Known]]:
    """A cluster on five virtual hosts, and the known answers of its undisturbed engines."""
    with host_cluster(tmp_path_factory.mktemp("hosts")) as cluster:
        yield cluster, asyncio.run(prepare(cluster))
