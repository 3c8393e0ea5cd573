"""Faults between hosts: no text is wrong, and no stream fails or is refused while an engine can be reached.

``scripts/bench hosts`` runs all cells. These are the shorter ones, one for each kind of fault.
"""

import asyncio
from collections.abc import Callable

import pytest

from loraserve.benchmarks.hosts.cells import CELLS, Known, run_cell
from loraserve.benchmarks.hosts.cluster import HostCluster
from loraserve.benchmarks.hosts.report import as_figures

SHOWN = ("sent", "migrated", "longest_gap_s", "recovery_s")
TESTED = (
    "undisturbed",
    "engine host cut off, 3 s",
    "packets from engine host lost, 3 s",
    "engine host with 5% loss, 200 ms delay",
    "engine stopped while cut off, adapter replaced",
    "monitor host cut from engine hosts, 12 s",
    "both engine hosts cut off, 5 s",
)


@pytest.mark.parametrize("name", TESTED)
def test_clients_notice_at_most_a_delay(
    hosts: tuple[HostCluster, Known], measured: Callable[[str], None], name: str
) -> None:
    result = asyncio.run(run_cell(*hosts, CELLS[name]))
    assert result.faults() == []
    figures = as_figures(result)
    measured(f"hosts, {name}: " + ", ".join(f"{figures[key]} {key}" for key in SHOWN))
