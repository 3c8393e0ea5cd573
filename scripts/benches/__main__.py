"""Finds the bench by its name and runs it."""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent


def bench_names() -> list[str]:
    """Every module of this folder but this one is a bench."""
    return sorted(path.stem for path in HERE.glob("*.py") if not path.stem.startswith("_"))


def usage() -> str:
    lines = ["usage: scripts/bench NAME [--quick] [--help]", "", "benches:"]
    for name in bench_names():
        bench = importlib.import_module(name)
        needs = getattr(bench, "NEEDS", "")
        lines.append(f"  {f'{name} {needs}':14s} {(bench.__doc__ or '').splitlines()[0]}")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status of the bench, 2 where there is none of that name."""
    if not arguments or arguments[0] in ("-h", "--help", "--list"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in bench_names():
        print(f"error: no bench is called {name!r}\n\n{usage()}", file=sys.stderr)
        return 2
    status: int = importlib.import_module(name).main(rest)
    return status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
