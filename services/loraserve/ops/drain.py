"""Emptying an engine and waiting until it is empty; using it again."""

import argparse
import sys
import time

import msgspec

from loraserve.ops import rebalance, status
from loraserve.ops.http import Ask, OpsError, patience
from loraserve.ops.text import one_line

POLL_S = 0.5
TELL_EVERY_S = 2.0


class Drained(msgspec.Struct, frozen=True, kw_only=True):
    """How it ended, for programs."""

    engine: str
    empty: bool
    requests: int
    copies: int
    epoch: int
    failed: tuple[str, ...]


def do_drain(arguments: argparse.Namespace, ask: Ask) -> int:
    engine = arguments.engine
    with patience(f"moving the copies of {engine} elsewhere"):
        done = rebalance.parse(ask(f"/admin/engines/{path_part(engine)}/drain", {}))
    if not arguments.json:
        print(rebalance.render(done, dry_run=False))
    stays = engine not in done.plan.drained or any(p.engine == engine for p in done.plan.placements)
    requests, copies = wait_until_empty(engine, time.monotonic() + arguments.timeout, stays, ask)
    empty = not requests and not copies
    ended = Drained(
        engine=engine, empty=empty, requests=requests, copies=copies, epoch=done.plan.epoch, failed=done.failed
    )
    print(one_line(msgspec.json.encode(ended)) if arguments.json else verdict(ended))
    return 0 if empty else 1


def do_undrain(arguments: argparse.Namespace, ask: Ask) -> int:
    with patience(f"placing adapters on {arguments.engine} too"):
        content = ask(f"/admin/engines/{path_part(arguments.engine)}/undrain", {})
    done = rebalance.parse(content)
    print(one_line(content) if arguments.json else rebalance.render(done, dry_run=False))
    if not (done.failed or arguments.json):
        print(f"{arguments.engine} takes requests again")
    return rebalance.exit_status(done)


def wait_until_empty(engine: str, deadline_s: float, stays: bool, ask: Ask) -> tuple[int, int]:
    """Requests and planned copies that are left; told to people as long as it takes.

    Where the plan leaves it something (``stays``), waiting is of no use: it looks once only.
    """
    told_s = time.monotonic()
    looks_empty = 0
    while True:
        requests, copies = left(status.parse(ask("/admin/cluster", None)), engine)
        # A report is a moment old, and may not know of the last request that came: one more look.
        looks_empty = 0 if requests or copies else looks_empty + 1
        now = time.monotonic()
        if stays or looks_empty > 1 or now > deadline_s:
            return requests, copies
        if not looks_empty and now - told_s >= TELL_EVERY_S:
            told_s = now
            print(f"{engine} still has {count(requests, copies)}", file=sys.stderr, flush=True)
        time.sleep(POLL_S)


def left(state: status.ClusterState, engine: str) -> tuple[int, int]:
    """An engine that is not there has nothing."""
    found = [e for e in state.engines if e.name == engine and e.alive]
    return status.left_to_drain(found[0].load) if found else (0, 0)


def verdict(ended: Drained) -> str:
    if ended.empty:
        return f"{ended.engine} is drained: it has no request and no planned copy, and can be stopped"
    return f"{ended.engine} is not empty: it still has {count(ended.requests, ended.copies)}; it goes on draining"


def count(requests: int, copies: int) -> str:
    return f"{requests} {'request' if requests == 1 else 'requests'} and {copies} planned {_copies(copies)}"


def _copies(number: int) -> str:
    return "copy" if number == 1 else "copies"


def path_part(engine: str) -> str:
    """A name as part of a path. Raises OpsError for what can be no engine's name."""
    if not engine or not all(c.isalnum() or c in "-_." for c in engine):
        raise OpsError(f"{engine!r} is no engine's name; scripts/status lists the engines")
    return engine
