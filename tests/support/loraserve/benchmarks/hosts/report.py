"""The table and the JSON of cells between virtual hosts."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from loraserve.benchmarks.hosts.cells import CellResult

COLUMNS = ("sent", "failed", "corrupted", "refused", "migrated", "longest gap, s", "recovery, s", "packets lost")
MOST_FAULTS = 5
"""Most different faults printed for a cell."""


def as_table(results: Sequence[CellResult]) -> str:
    """Return aligned columns, one line per cell, and a line per fault."""
    rows = [["cell", *COLUMNS]]
    rows += [[result.cell, *(_text(value) for value in as_figures(result).values())] for result in results]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *rest in rows:
        numbers = [text.rjust(width) for text, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *numbers]))
    for result in results:
        faults = Counter(result.faults())
        lines += [f"  {result.cell}: {fault} ({times} times)" for fault, times in faults.most_common(MOST_FAULTS)]
    return "\n".join(lines)


def as_figures(result: CellResult) -> dict[str, Any]:
    """Return the figures of a cell in the order of COLUMNS, for JSON. A recovery that did not happen is None."""
    counts = result.counts
    return {
        "sent": counts.sent,
        "failed": counts.failed,
        "corrupted": counts.corrupted,
        "refused": counts.refused,
        "migrated": result.migrations,
        "longest_gap_s": round(counts.longest_gap_s, 2),
        "recovery_s": None if result.recovery_s is None else round(result.recovery_s, 2),
        "packets_lost": result.packets_dropped,
    }


def _text(value: Any) -> str:
    return "-" if value is None else str(value)
