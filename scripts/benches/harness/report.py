"""Output of a bench: progress on stderr, tables, and one line of JSON at the end."""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loraserve.device import core_count

STARTED_S = time.monotonic()
ROOT = Path(__file__).resolve().parents[3]


class BenchError(Exception):
    """A measurement failed. The text names the measurement and the reason."""


Number = float | int | None


def say(text: str) -> None:
    """Print a line of progress."""
    print(f"[{time.monotonic() - STARTED_S:6.1f} s] {text}", file=sys.stderr, flush=True)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return aligned columns under a title. The first column is text; None is shown as "-"."""
    cells = [[_cell(value) for value in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ["", title]
    for row in cells:
        others = [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *others]).rstrip())
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)


def ratio(ours: Number, theirs: Number) -> float | None:
    """Return ours / theirs, or None if either was not measured."""
    return None if not ours or not theirs else rounded(ours / theirs)


def rounded(value: float) -> float:
    """Round to four significant digits, because further digits are noise."""
    return float(f"{value:.4g}")


def last_line(bench: str, ratios: Mapping[str, Number], figures: Mapping[str, Number]) -> str:
    """Return the line of JSON that every bench ends with. A figure that was not measured is null."""
    content = {
        "bench": bench,
        "ratios": dict(ratios),
        "figures": {key: rounded(value) if isinstance(value, float) else value for key, value in figures.items()},
        "machine": machine(),
        "commit": commit(),
    }
    return json.dumps(content, allow_nan=False)


def machine() -> str:
    """Return processor, number of cores and torch version, on which figures depend most."""
    return f"{_processor()}, {core_count()} cores, torch {version('torch')}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    """Return the commit of the checkout, with "-dirty" if tracked files are modified."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return found.stdout.strip() or "unknown"
