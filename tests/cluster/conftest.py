"""One real cluster with the demo model for all tests of this folder; each test restores its state."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from loraserve.demo import demo_adapters
from loraserve.demo.model import prepare_model
from loraserve.demo.paths import default_data_dir
from loraserve.demo.shipped import SHIPPED_DIR
from loraserve.demo.weights import expand_rank
from loraserve.testing.local_cluster import LocalCluster


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo model, prepared once per machine."""
    return prepare_model(default_data_dir(), print)


@pytest.fixture(scope="session")
def eight_adapters(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The four demo adapters, and each again at another rank: eight versions of ranks 8 to 64."""
    shipped = {adapter.name: adapter.path for adapter in demo_adapters(default_data_dir())}
    folder = tmp_path_factory.mktemp("adapters")
    found = dict(shipped)
    for name, rank in (("pirate", 24), ("json", 40), ("french", 56), ("shout", 48)):
        target = folder / f"{name}-r{rank}"
        target.mkdir()
        expand_rank(SHIPPED_DIR / name, target, rank, seed=rank)
        found[target.name] = target
    return found


@pytest.fixture(scope="session")
def cluster(
    demo_model: Path, eight_adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalCluster]:
    """A cluster of two engines and eight adapters, started with the command that users run."""
    data_dir = tmp_path_factory.mktemp("cluster")
    with LocalCluster(data_dir, "--model", str(demo_model), adapters=eight_adapters) as running:
        yield running
