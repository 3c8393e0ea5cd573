"""Computes the row of a cell from its requests, and writes the table."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from harness.report import Number

from faulty.cells import Cell, Fault
from faulty.traffic import Outcome, Request

MAX_NOTES = 6
MOVING_FAULTS = (Fault.KILL, Fault.TERM, Fault.STOP)
"""The faults that move all streams of an engine to another one."""


class Row(NamedTuple):
    """The result of one cell.

    Attributes:
        failed: Requests that ended with an error, or were refused although an engine was undisturbed.
        longest_wait_s: Longest time without a token of any request, also before the first token.
        gap_s: Median, over the streams that ran when the fault began, of the longest time between two tokens.
        moved_gap_s: The same for those on a disturbed engine. None if there were none.
        recovered_s: Seconds from the end of the fault until all processes were ready and every stream had gone on.
    """

    cell: Cell
    sent: int
    failed: int
    corrupted: int
    refused: int
    cut: int
    longest_wait_s: float
    gap_s: float | None
    moved_gap_s: float | None
    recovered_s: float
    notes: tuple[str, ...]


def row(
    cell: Cell,
    requests: Sequence[Request],
    engines: Sequence[str],
    times_s: tuple[float, float, float],
    notes: Sequence[str],
) -> Row:
    """Return the row. ``times_s`` are the begin and end of the fault and the recovery."""
    began_s, ended_s, recovered_s = times_s
    by = {outcome: [each for each in requests if each.outcome is outcome] for outcome in Outcome}
    may_cut = cell.fault is Fault.KILL and any(name.startswith("gateway") for name in cell.targets)
    may_refuse = not cell.leaves_an_engine(engines)
    failed = [*by[Outcome.FAILED]]
    failed += [] if may_cut else by[Outcome.CUT]
    failed += [] if may_refuse else by[Outcome.REFUSED]
    running = [each for each in requests if each.streamed and each.sent_s < began_s < each.ended_s]
    moved = [each for each in running if each.engine in cell.targets and cell.fault in MOVING_FAULTS]
    bad = [*by[Outcome.CORRUPTED], *failed]
    return Row(
        cell=cell,
        sent=len(requests),
        failed=len(failed),
        corrupted=len(by[Outcome.CORRUPTED]),
        refused=len(by[Outcome.REFUSED]) if may_refuse else 0,
        cut=len(by[Outcome.CUT]) if may_cut else 0,
        longest_wait_s=max((each.longest_wait_s() for each in requests if each.streamed), default=0.0),
        gap_s=_median_gap_s(running),
        moved_gap_s=_median_gap_s(moved),
        recovered_s=max(0.0, recovered_s - ended_s),
        notes=(*notes, *(f"{each.why} (at {each.sent_s - began_s:+.1f} s)" for each in bad[:MAX_NOTES])),
    )


def _median_gap_s(streams: Sequence[Request]) -> float | None:
    return _median([gap for each in streams if (gap := each.longest_gap_s()) is not None])


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


HEADER = (
    "fault",
    "process",
    "sent",
    "failed",
    "corrupted",
    "refused",
    "cut",
    "longest wait, s",
    "median gap, s",
    "of moved streams, s",
    "recovered, s",
)


def markdown(rows: Sequence[Row]) -> str:
    """Return the table in markdown."""
    lines = [HEADER, ["---"] * len(HEADER), *(_texts(each) for each in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _texts(each: Row) -> list[str]:
    counts = (each.sent, each.failed, each.corrupted, each.refused, each.cut)
    seconds = (each.longest_wait_s, each.gap_s, each.moved_gap_s, each.recovered_s)
    return [
        each.cell.title,
        each.cell.target,
        *map(str, counts),
        *("-" if value is None else f"{value:.2f}" for value in seconds),
    ]


def figures(rows: Sequence[Row], engines: Sequence[str]) -> dict[str, Number]:
    """Return the figures of the last line."""
    excused = [each for each in rows if not each.cell.leaves_an_engine(engines)]
    gaps = [(each.cell.fault, each.moved_gap_s) for each in rows if each not in excused]
    moved = {wanted: [gap for fault, gap in gaps if fault is wanted and gap is not None] for wanted in MOVING_FAULTS}
    calm = [each.gap_s for each in rows if each.cell.fault is Fault.NONE and each.gap_s is not None]
    return {
        "cells": len(rows),
        "sent": sum(each.sent for each in rows),
        "corrupted": sum(each.corrupted for each in rows),
        "failed_with_an_engine": sum(each.failed for each in rows if each not in excused),
        "failed_without_engines": sum(each.failed for each in excused),
        "refused_without_engines": sum(each.refused for each in excused),
        "cut": sum(each.cut for each in rows),
        "killed_gap_s": _median(moved[Fault.KILL]),
        "terminated_gap_s": _median(moved[Fault.TERM]),
        "stopped_gap_s": _median(moved[Fault.STOP]),
        "undisturbed_gap_s": _median(calm),
        "recovered_median_s": statistics.median(each.recovered_s for each in rows),
        "recovered_longest_s": max(each.recovered_s for each in rows),
    }


def violations(rows: Sequence[Row], engines: Sequence[str]) -> int:
    """Return the number of things that must not happen: wrong texts, failures, and losses that a note names."""
    found = sum(each.corrupted for each in rows)
    found += sum(each.failed for each in rows if each.cell.leaves_an_engine(engines))
    return found + sum(note.startswith(("LOST", "NOT RECOVERED")) for each in rows for note in each.notes)
