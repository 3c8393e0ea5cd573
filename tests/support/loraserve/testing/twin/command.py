"""Runs schedules drawn from a range of seeds, shrinks the first that breaks a rule, and prints how to run it again."""

import argparse
import gc
import secrets
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec

from loraserve.testing.twin.checks import Outcome
from loraserve.testing.twin.cluster import run_schedule, silence_logs
from loraserve.testing.twin.mutations import MUTATIONS, planted
from loraserve.testing.twin.schedule import Schedule, draw_schedule

DESCRIPTION = """\
Run the whole cluster in virtual time with requests and faults drawn from seeds, and check that every request ends with
the right text and that nothing is left of it.

  scripts/twin --seeds 10000                the first 10,000 seeds, which are the same in every run
  scripts/twin --fresh --minutes 30         new seeds for half an hour
  scripts/twin --first 4711 --seeds 1       one seed again, with its schedule
  scripts/twin --schedule FILE              a schedule that was printed as JSON; - reads standard input
  scripts/twin --mutation keep_pins         plant a bug, which must be found

If a rule is broken, the exit status is 1. The schedule is then shrunk: requests and faults that it does not need are
removed. Runs are deterministic: the same seed and code give the same run."""

PART = 50
"""Seeds that one worker runs between two reports. Garbage is collected after them only, which saves a quarter."""
REPORT_S = 2.0
MAX_SEED = 1 << 40


class Part(NamedTuple):
    """The result of some seeds: how many were run in which CPU time, and the first that broke a rule."""

    runs: int
    cpu_s: float
    failed: int | None = None
    violations: tuple[str, ...] = ()


def run_part(seeds: range, mutation: str = "") -> Part:
    """Run seeds until one breaks a rule."""
    # The cancelled tasks of killed processes leave coroutines that never began.
    warnings.simplefilter("ignore", RuntimeWarning)
    began_s = time.process_time()
    gc.collect()
    gc.disable()
    try:
        with planted(mutation):
            for run, seed in enumerate(seeds, 1):
                violations = run_schedule(draw_schedule(seed)).violations
                if violations:
                    return Part(run, time.process_time() - began_s, seed, violations)
    finally:
        gc.enable()
    return Part(len(seeds), time.process_time() - began_s)


def shrink(schedule: Schedule, run: Callable[[Schedule], Outcome] = run_schedule) -> Schedule:
    """Remove happenings as long as the schedule still breaks the same kind of rule. Returns the smaller schedule."""
    kind = _kind(run(schedule))
    smaller = True
    while smaller:
        smaller = False
        for happening in reversed(schedule.happenings):
            candidate = schedule.without(happening)
            if _kind(run(candidate)) == kind:
                schedule, smaller = candidate, True
    return schedule


def _kind(outcome: Outcome) -> str:
    """Return the part of the first violation before its details."""
    return outcome.violations[0].partition(":")[0] if outcome.violations else ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/twin", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=0, metavar="N", help="number of seeds (default 1000)")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="the first seed (default 0)")
    parser.add_argument("--fresh", action="store_true", help="draw the first seed")
    parser.add_argument("--minutes", type=float, default=0.0, help="run seeds until this time has passed")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="worker processes (default 1)")
    parser.add_argument("--mutation", default="", choices=["", *MUTATIONS], metavar="NAME", help=", ".join(MUTATIONS))
    parser.add_argument("--schedule", type=Path, metavar="FILE", help="run this schedule instead of seeds")
    options = parser.parse_args(arguments)
    if options.schedule is not None:
        text = sys.stdin.read() if str(options.schedule) == "-" else options.schedule.read_text()
        return _run_again(msgspec.json.decode(text, type=Schedule), options.mutation)
    first = secrets.randbelow(MAX_SEED) if options.fresh else options.first
    seeds = range(first, first + (options.seeds or (MAX_SEED if options.minutes else 1000)))
    if len(seeds) == 1:
        return _run_again(draw_schedule(first), options.mutation)
    return _run_seeds(seeds, options)


def _run_seeds(seeds: range, options: argparse.Namespace) -> int:
    silence_logs()
    began_s = reported_s = time.monotonic()
    runs, cpu_s = 0, 0.0
    for part in _parts(seeds, options.jobs, options.mutation):
        runs, cpu_s = runs + part.runs, cpu_s + part.cpu_s
        elapsed_s = time.monotonic() - began_s
        if part.failed is not None:
            _report_failure(part, options.mutation)
            return 1
        if time.monotonic() - reported_s >= REPORT_S:
            reported_s = time.monotonic()
            print(f"{runs} schedules, {1000 * cpu_s / runs:.1f} ms of CPU each", file=sys.stderr, flush=True)
        if options.minutes and elapsed_s > 60 * options.minutes:
            break
    each = f"{1000 * cpu_s / runs:.1f} ms of CPU each"
    print(f"{runs} schedules from seed {seeds[0]} in {time.monotonic() - began_s:.0f} s, {each}: no rule was broken")
    return 0


def _parts(seeds: range, jobs: int, mutation: str) -> Iterator[Part]:
    """Run the seeds in parts, in order. With several jobs, stopping early leaves at most some parts unused."""
    pieces = (seeds[start : start + PART] for start in range(0, len(seeds), PART))
    run = partial(run_part, mutation=mutation)
    if jobs == 1:
        yield from map(run, pieces)
        return
    with ProcessPoolExecutor(jobs, initializer=silence_logs) as workers:
        while True:
            running = [workers.submit(run, piece) for piece, _ in zip(pieces, range(4 * jobs), strict=False)]
            if not running:
                return
            for job in running:
                yield job.result()


def _report_failure(part: Part, mutation: str) -> None:
    assert part.failed is not None, "only failed parts are reported"
    print(f"seed {part.failed} broke a rule:", *part.violations, sep="\n  ")
    planting = f" --mutation {mutation}" if mutation else ""
    print(f"run it again: scripts/twin --first {part.failed} --seeds 1{planting}")
    with planted(mutation):
        print("shrinking it...", file=sys.stderr, flush=True)
        small = shrink(draw_schedule(part.failed))
        print("shrunk:", small.describe(), *run_schedule(small).violations, sep="\n")
    print("run the shrunk schedule again:")
    print(f"scripts/twin --schedule -{planting} <<< '{msgspec.json.encode(small).decode()}'")


def _run_again(schedule: Schedule, mutation: str) -> int:
    silence_logs()
    warnings.simplefilter("ignore", RuntimeWarning)
    print(schedule.describe())
    with planted(mutation):
        outcome = run_schedule(schedule)
    text = "broke a rule:" if outcome.violations else "no rule was broken"
    print(f"{outcome.answers} requests, {outcome.ended_s:.1f} virtual seconds, {text}", *outcome.violations, sep="\n  ")
    return 1 if outcome.violations else 0
