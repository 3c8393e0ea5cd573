"""The whole cluster in virtual time keeps its promises under faults, and bugs that are planted are found."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import msgspec
import pytest
import structlog

from loraserve.testing.twin.cluster import run_schedule
from loraserve.testing.twin.command import run_part, shrink
from loraserve.testing.twin.mutations import MUTATIONS, planted
from loraserve.testing.twin.schedule import Kill, Schedule, draw_schedule

SEEDS = 10_000
PARTS = 5
MUTATION_SEEDS = 400
"""Each planted bug is found within this many seeds, most within 50."""


@pytest.fixture(autouse=True)
def no_logs() -> Iterator[None]:
    """Drop the product's log lines, which would take most of the time. Loggers are not cached, so later tests log."""
    before = structlog.get_config()
    quiet = structlog.make_filtering_bound_logger(logging.CRITICAL)
    structlog.configure(wrapper_class=quiet, cache_logger_on_first_use=False)
    yield
    structlog.configure(**before)


@pytest.mark.parametrize("part", range(PARTS))
def test_no_rule_is_broken_under_faults(part: int) -> None:
    each = SEEDS // PARTS
    command = [sys.executable, "-m", "loraserve.testing.twin", "--first", str(part * each), "--seeds", str(each)]
    run = subprocess.run([*command, "--jobs", str(os.cpu_count() or 1)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_planted_bug_is_found(mutation: str) -> None:
    result = run_part(range(MUTATION_SEEDS), mutation)
    assert result.failed is not None


def test_the_same_seed_gives_the_same_run_in_another_process() -> None:
    code = (
        "from loraserve.testing.twin.cluster import *; from loraserve.testing.twin.schedule import draw_schedule;"
        "silence_logs(); print([run_schedule(draw_schedule(seed)).trace for seed in range(30)])"
    )
    runs = [
        subprocess.run([sys.executable, "-W", "ignore", "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True)
        for seed in ("1", "2")
    ]
    traces = [json.loads(run.stdout) for run in runs]
    assert traces[0] == traces[1]
    assert len(set(traces[0])) > 25, "the trace tells runs apart"


def test_a_schedule_shrinks_to_the_happenings_that_break_the_rule() -> None:
    with planted("give_up_after_deaths"):
        seed = run_part(range(MUTATION_SEEDS), "give_up_after_deaths").failed
        assert seed is not None
        schedule = draw_schedule(seed)
        small = shrink(schedule)
        assert len(small.happenings) < len(schedule.happenings)
        assert [type(fault) for fault in small.faults] == [Kill]
        assert all(not run_schedule(small.without(each)).violations for each in small.happenings), "all are needed"
        again = msgspec.json.decode(msgspec.json.encode(small), type=Schedule)
        assert run_schedule(again).violations == run_schedule(small).violations != ()
    assert run_schedule(small).violations == ()
