"""Finds a bench by its name and runs it."""

import importlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

HERE = Path(__file__).resolve().parent


def bench_names() -> list[str]:
    """Return the names of all benches: the modules of this folder without a leading underscore."""
    return sorted(path.stem for path in HERE.glob("*.py") if not path.stem.startswith("_"))


def usage() -> str:
    """Return the help text with the first line of each bench's docstring."""
    lines = ["usage: scripts/bench NAME [--quick] [--help]", "", "benches:"]
    for name in bench_names():
        bench = importlib.import_module(name)
        needs = getattr(bench, "NEEDS", "")
        lines.append(f"  {f'{name} {needs}':14s} {(bench.__doc__ or '').splitlines()[0]}")
    lines += ["", "Each bench prints tables, then one line of JSON. scripts/bench NAME --help explains a bench."]
    return "\n".join(lines)


def stop_on_signal(number: int, _: FrameType | None) -> None:
    """Raise SystemExit, so that each `with` block stops the processes that it started."""
    # A second signal must not interrupt the stopping.
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(128 + number)


STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


def main(arguments: Sequence[str]) -> int:
    """Run a bench. Returns its exit status, or 2 if no bench has that name."""
    if not arguments or arguments[0] in ("-h", "--help", "--list"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in bench_names():
        print(f"error: no bench is called {name!r}\n\n{usage()}", file=sys.stderr)
        return 2
    for number in STOP_SIGNALS:
        signal.signal(number, stop_on_signal)
    status: int = importlib.import_module(name).main(rest)
    return status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
