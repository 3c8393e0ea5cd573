"""Formats tables, bars and sizes for terminal output."""

from collections.abc import Sequence

BAR_CELLS = 10


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return the table as text with aligned columns. Columns that contain only figures are right-aligned."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    right = [bool(rows) and all(_is_figure(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join(
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in [head, *rows]
    )


def bar(used: float, total: float) -> str:
    """Return a bar such as ``###.......  31%``. Any use above 0 fills at least one cell."""
    share = min(max(used / total, 0.0), 1.0) if total > 0 else 0.0
    cells = max(round(share * BAR_CELLS), 1 if share else 0)
    return "#" * cells + "." * (BAR_CELLS - cells) + f"{share:5.0%}"


def size(count_bytes: float) -> str:
    """Return a byte count in the largest of B, KiB, MiB and GiB in which the number is at least 1."""
    value = float(count_bytes)
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def _is_figure(cell: str) -> bool:
    return cell in ("", "-") or cell[0].isdigit()
