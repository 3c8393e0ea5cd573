"""Progress, tables and the line of JSON that the bench ends in."""

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
import torch

STARTED_S = time.monotonic()

Value = float | int | str | None


def say(text: str) -> None:
    """One line of progress."""
    print(f"[{time.monotonic() - STARTED_S:6.1f} s] {text}", file=sys.stderr, flush=True)


def table(header: Sequence[str], rows: Sequence[Sequence[Value]]) -> str:
    """Aligned columns; the first two are text, None shows as "-"."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for row in cells:
        padded = [
            text.ljust(width) if i < 2 else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _cell(value: Value) -> str:
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def last_line(bench: str, ratios: Mapping[str, Value], figures: Mapping[str, Value]) -> str:
    """The one line of JSON. None is null: not measured."""
    content = {
        "bench": bench,
        "ratios": {name: _rounded(value) for name, value in ratios.items()},
        "figures": {name: _rounded(value) for name, value in figures.items()},
        "machine": machine(),
        "commit": commit(),
    }
    return msgspec.json.encode(content).decode()


def _rounded(value: Value) -> Value:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def machine() -> str:
    """The GPU, and what compiled for it."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA GPU"
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return f"{name}, torch {torch.__version__}, triton {triton}"


def commit() -> str:
    """The checkout's commit, marked where tracked files differ from it; "unknown" outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"
