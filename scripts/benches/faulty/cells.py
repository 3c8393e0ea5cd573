"""The cells of the table: which process is disturbed, and how."""

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

SHORT_STOP_S, LONG_STOP_S = 5.0, 30.0
DISK_S = 8.0
CLOCK_S = 8.0
MESSAGES_S = 6.0
PARTITION_S = 8.0
"""Longer than ``monitor.dead_after_s``, after which a silent engine counts as dead."""
UNDISTURBED_S = 12.0


class Fault(StrEnum):
    """A fault. Its value is the text in the table."""

    NONE = "undisturbed"
    KILL = "kill -9"
    TERM = "SIGTERM"
    STOP = "SIGSTOP"
    SLOW_DISK = "slow disk"
    STUCK_DISK = "stuck disk"
    FULL_DISK = "full disk"
    CLOCK = "clock +1 h, -1 h"
    LOSS = "5% of messages lost"
    DOUBLE = "20% of messages doubled"
    REORDER = "20% of messages overtaken"
    PARTITION = "partition"


DISK_FAULTS = (Fault.SLOW_DISK, Fault.STUCK_DISK, Fault.FULL_DISK)
MESSAGE_FAULTS = (Fault.LOSS, Fault.DOUBLE, Fault.REORDER)


class Cell(NamedTuple):
    """One row of the table. In a partition, ``targets`` are cut off from ``others``, in both directions."""

    fault: Fault
    targets: tuple[str, ...] = ()
    seconds: float = 0.0
    others: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        duration = f" {self.seconds:.0f} s" if self.fault is Fault.STOP else ""
        return f"{self.fault}{duration}"

    @property
    def target(self) -> str:
        names = " + ".join(self.targets) or "-"
        return f"{names} \\| {', '.join(self.others)}" if self.others else names

    def leaves_an_engine(self, engines: Sequence[str]) -> bool:
        """Return whether an engine is undisturbed, so that every request must succeed."""
        return not set(engines) <= set(self.targets)


def all_cells(names: Sequence[str]) -> list[Cell]:
    """Return the whole table for the processes of a cluster with two engines."""
    engines = tuple(name for name in names if name.startswith("engine-"))
    single = [(name,) for name in ("gateway-0", "router", "monitor", "planner", "store", *engines)]
    targets = [*single, engines]
    cells = [Cell(Fault.NONE, seconds=UNDISTURBED_S)]
    for fault in (Fault.KILL, Fault.TERM):
        cells += [Cell(fault, each) for each in targets]
    for seconds in (SHORT_STOP_S, LONG_STOP_S):
        cells += [Cell(Fault.STOP, each, seconds) for each in targets]
    for fault in DISK_FAULTS:
        cells += [Cell(fault, (name,), DISK_S) for name in ("store", "planner")]
    cells += [Cell(Fault.CLOCK, each, CLOCK_S) for each in single]
    for fault in MESSAGE_FAULTS:
        cells += [Cell(fault, each, MESSAGES_S) for each in single]
    return [*cells, *partitions(names)]


def partitions(names: Sequence[str]) -> list[Cell]:
    pairs = [
        ("gateway-0", "router"),
        ("gateway-0", "engine-0"),
        ("gateway-0", "monitor"),
        ("router", "engine-0"),
        ("router", "monitor"),
        ("monitor", "engine-0"),
        ("planner", "engine-0"),
        ("planner", "monitor"),
        ("store", "engine-0"),
        ("engine-0", "engine-1"),
    ]
    cells = [Cell(Fault.PARTITION, (one,), PARTITION_S, (other,)) for one, other in pairs]
    rest = tuple(name for name in names if name != "engine-0")
    return [*cells, Cell(Fault.PARTITION, ("engine-0",), PARTITION_S, rest)]


def quick_cells() -> list[Cell]:
    """Return a handful that takes less than a minute after the cluster has started."""
    return [
        Cell(Fault.NONE, seconds=2.0),
        Cell(Fault.KILL, ("router",)),
        Cell(Fault.FULL_DISK, ("store",), 2.0),
        Cell(Fault.PARTITION, ("engine-0",), 3.0, ("gateway-0", "monitor")),
    ]
