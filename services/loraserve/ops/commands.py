"""The operator commands. Each sends requests to the gateway, prints the answer and returns an exit status."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from urllib.parse import quote

import msgspec

from loraserve.messages import RebalanceDone
from loraserve.ops import rendering, status
from loraserve.ops.arguments import parser
from loraserve.ops.gateway_client import Ask, GatewayAddress, OpsError, exchange, report_progress
from loraserve.ops.status import ClusterAnswer

WATCH_INTERVAL_S = 2.0
CLEAR_SCREEN = "\x1b[H\x1b[2J"
DRAIN_POLL_S = 0.5
DRAIN_REPORT_INTERVAL_S = 2.0


class DrainResult(msgspec.Struct, frozen=True, kw_only=True):
    """The output of scripts/drain --json."""

    engine: str
    empty: bool
    requests: int
    copies: int
    epoch: int
    failed: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit status: 0 on success, 1 on failure, 130 after Ctrl-C."""
    arguments = parser().parse_args(argv)
    ask = partial(exchange, GatewayAddress(arguments.url, arguments.api_key))
    run = COMMANDS[arguments.command]
    try:
        return run(arguments, ask)
    except OpsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of the pipe has exited, like `head`. Without this, flushing the buffer at exit fails again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def show_status(arguments: argparse.Namespace, ask: Ask) -> int:
    _show_status_once(arguments, ask)
    while arguments.watch:
        time.sleep(WATCH_INTERVAL_S)
        try:
            _show_status_once(arguments, ask)
        except OpsError as error:
            # Continue, because the user may be waiting for a cluster that restarts.
            print(f"error: {error}", file=sys.stderr)
    return 0


def _show_status_once(arguments: argparse.Namespace, ask: Ask) -> None:
    with report_progress("asking the gateway"):
        content = ask("/admin/cluster", None)
    state = rendering.decode(content, ClusterAnswer)
    if arguments.json:
        print(rendering.one_line(content), flush=True)
        return
    clear = CLEAR_SCREEN if arguments.watch and sys.stdout.isatty() else ""
    print(clear + status.render(state), end="\n\n" if arguments.watch else "\n", flush=True)


def rebalance(arguments: argparse.Namespace, ask: Ask) -> int:
    with report_progress("planning" if arguments.dry_run else "planning and loading adapters"):
        content = ask("/admin/rebalance", {"dry_run": arguments.dry_run})
    done = rendering.decode(content, RebalanceDone)
    print(rendering.one_line(content) if arguments.json else rendering.render_rebalance(done, arguments.dry_run))
    return rendering.exit_status(done)


def drain(arguments: argparse.Namespace, ask: Ask) -> int:
    """Drain an engine and wait until it has no request and no planned copy. Returns 1 if any remains."""
    engine = arguments.engine
    with report_progress(f"moving the copies of {engine} to other engines"):
        done = rendering.decode(ask(f"/admin/engines/{engine_path(engine)}/drain", {}), RebalanceDone)
    if not arguments.json:
        print(rendering.render_rebalance(done, dry_run=False))
    # If the plan keeps copies on the engine, the engine never becomes empty. It is then checked only once.
    keeps_copies = engine not in done.plan.drained or any(p.engine == engine for p in done.plan.placements)
    deadline_s = time.monotonic() + (0.0 if keeps_copies else arguments.timeout)
    requests, copies = _wait_until_empty(engine, deadline_s, ask)
    empty = not requests and not copies
    result = DrainResult(
        engine=engine, empty=empty, requests=requests, copies=copies, epoch=done.plan.epoch, failed=done.failed
    )
    print(rendering.one_line(msgspec.json.encode(result)) if arguments.json else _drain_outcome(result))
    return 0 if empty else 1


def undrain(arguments: argparse.Namespace, ask: Ask) -> int:
    with report_progress(f"placing adapters on {arguments.engine}"):
        content = ask(f"/admin/engines/{engine_path(arguments.engine)}/undrain", {})
    done = rendering.decode(content, RebalanceDone)
    print(rendering.one_line(content) if arguments.json else rendering.render_rebalance(done, dry_run=False))
    if not (done.failed or arguments.json):
        print(f"{arguments.engine} accepts requests again")
    return rendering.exit_status(done)


def _wait_until_empty(engine: str, deadline_s: float, ask: Ask) -> tuple[int, int]:
    """Poll until the engine has neither requests nor planned copies, or the deadline passes. Returns both numbers."""
    reported_s = time.monotonic()
    empty_polls = 0
    while True:
        requests, copies = _remaining(rendering.decode(ask("/admin/cluster", None), ClusterAnswer), engine)
        # A load report may be too old to include the newest request, so two empty polls are required.
        empty_polls = 0 if requests or copies else empty_polls + 1
        now = time.monotonic()
        if empty_polls > 1 or now > deadline_s:
            return requests, copies
        if not empty_polls and now - reported_s >= DRAIN_REPORT_INTERVAL_S:
            reported_s = now
            print(f"{engine} still has {_counts(requests, copies)}", file=sys.stderr, flush=True)
        time.sleep(DRAIN_POLL_S)


def _remaining(state: ClusterAnswer, engine: str) -> tuple[int, int]:
    """Return the engine's numbers of requests and planned copies. Both are 0 for a dead or unknown engine."""
    found = [e for e in state.engines if e.name == engine and e.alive]
    return status.left_to_drain(found[0].load) if found else (0, 0)


def _drain_outcome(result: DrainResult) -> str:
    if result.empty:
        return f"{result.engine} is drained: it has no request and no planned copy, and can be stopped"
    remaining = _counts(result.requests, result.copies)
    return f"{result.engine} is not empty: it still has {remaining}; it continues to drain"


def _counts(requests: int, copies: int) -> str:
    request, copy = "request" if requests == 1 else "requests", "copy" if copies == 1 else "copies"
    return f"{requests} {request} and {copies} planned {copy}"


def engine_path(engine: str) -> str:
    """Return the engine's name unchanged if it is safe in a URL path. Raises OpsError otherwise."""
    if not engine or not all(c.isalnum() or c in "-_." for c in engine):
        raise OpsError(f"{engine!r} is not an engine's name; scripts/status lists the engines")
    return engine


def show_story(arguments: argparse.Namespace, ask: Ask) -> int:
    """Print the events of a request or an adapter in all processes. Returns 1 if there are none."""
    with report_progress("asking all processes"):
        content = ask(f"/admin/story/{quote(arguments.id)}", None)
    story = rendering.decode(content, rendering.MergedStory)
    print(rendering.one_line(content) if arguments.json else rendering.render_story(story))
    return 0 if story.entries else 1


def manage_adapters(arguments: argparse.Namespace, ask: Ask) -> int:
    match arguments.action:
        case "load":
            said = _load_adapter(arguments.name, arguments.dir, arguments.replace, ask)
        case "unload":
            with report_progress(f"unloading {arguments.name}"):
                said = ask("/v1/unload_lora_adapter", {"lora_name": arguments.name})
        case _:
            return _list_adapters(arguments, ask)
    text = said.decode(errors="replace")
    print(msgspec.json.encode({"adapter": arguments.name, "message": text}).decode() if arguments.json else text)
    return 0


def _load_adapter(name: str, folder: str, replace: bool, ask: Ask) -> bytes:
    body = {"lora_name": name, "lora_path": store_path(folder), "load_inplace": replace}
    try:
        with report_progress(f"checking and packing {name}"):
            return ask("/v1/load_lora_adapter", body)
    except OpsError as error:
        if error.code != "duplicate":
            raise
        raise OpsError(f"an adapter named {name} is already loaded; replace it with --replace") from error


def _list_adapters(arguments: argparse.Namespace, ask: Ask) -> int:
    found = rendering.decode(ask("/v1/models", None), rendering.ModelList).adapters()
    print(msgspec.json.encode(found).decode() if arguments.json else rendering.render_adapters(found))
    return 0


def store_path(text: str) -> str:
    """Return the absolute path if ``text`` names an existing folder, else ``text`` unchanged.

    The store runs in another working directory. A folder that is missing here may exist on the store's machine.
    """
    path = Path(text).expanduser()
    return str(path.resolve()) if path.is_dir() else text


COMMANDS: dict[str, Callable[[argparse.Namespace, Ask], int]] = {
    "status": show_status,
    "rebalance": rebalance,
    "drain": drain,
    "undrain": undrain,
    "story": show_story,
    "adapters": manage_adapters,
}
